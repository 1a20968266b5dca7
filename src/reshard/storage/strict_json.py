"""JSON as every file of a checkpoint, a base or an output is read: strictly, within a budget.

Strict: UTF-8 without a byte order mark, which transformers 5.23, PEFT 0.21 and safetensors 0.8
refuse as well; no key twice in an object, no half of a surrogate pair, at most `MAX_DEPTH` levels.
`NaN`, `Infinity` and numbers beyond 64 bits are accepted as Python accepts them: configs of
state-space models hold an `Infinity`.

What a text takes in memory is estimated from its length and its punctuation before it is parsed.
The estimate of all that is accepted is below `_MAX_HELD`, so that a command that is given a hostile
file stays under 256 MiB: 200,000 lines of an index fit, 400,000 do not.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from reshard.core.regex import regex
from reshard.errors import FormatError
from reshard.storage.local import Sources
from reshard.storage.source import Source

T = TypeVar("T")
Record = TypeVar("Record", bound=msgspec.Struct)

#: Bytes of a config: a hundred times the largest.
MAX_CONFIG = 16 << 20
#: Bytes of an index of tensors or of a `reshard.json`: four times that of 200,000 tensors.
MAX_INDEX = 128 << 20
#: Levels of lists and objects; configs have about five.
MAX_DEPTH = 100
# Bytes that a parsed text may take, the text itself included.
_MAX_HELD = 176 << 20
# Bytes that a value takes for each comma, colon and opening bracket, at most: `{"a":1},` is an
# object of 184 to 232 bytes and its place in a list, for three; `"abc":1000,` a key of 52, a number
# of 32 and up to 100 in the object's table, for two.
_TOKEN_NBYTES = 90
_PUNCTUATION = (b",", b":", b"[", b"{")
_BOM = b"\xef\xbb\xbf"
_WIDE = regex(rb"[\xf0-\xf4]|\\[uU][dD][89abAB]")
_KEY = regex(rb'"[^"\\]*(?:\\.[^"\\]*)*"\s*(:?)', re.DOTALL)


def read_object(source: Source, *, max_nbytes: int = MAX_CONFIG) -> dict[str, Any]:
    """The object that an opened JSON file holds. Raises `FormatError`."""
    return parse_object(read_whole(source, max_nbytes=max_nbytes), source.ref.path)


def read_file(path: Path, *, max_nbytes: int = MAX_CONFIG) -> dict[str, Any]:
    """The object that the JSON file `path` holds. Raises `FormatError`, `NotFoundError`."""
    with Sources() as sources:
        return read_object(sources.open(path), max_nbytes=max_nbytes)


def read_value(path: Path, *, max_nbytes: int = MAX_CONFIG) -> Any:
    """The JSON value, of whatever kind, that a file of the user's holds."""
    with Sources() as sources:
        return parse(read_whole(sources.open(path), max_nbytes=max_nbytes), str(path))


def read_whole(source: Source, *, max_nbytes: int) -> bytes:
    """All bytes of an opened file. Raises `FormatError` where there are more than `max_nbytes`."""
    if source.size > max_nbytes:
        raise FormatError(
            f"it has {source.size} bytes; reshard reads at most {max_nbytes}.",
            path=source.ref.path,
            hint="It is not what its name says.",
        )
    return source.read(0, source.size)


def parse_object(text: bytes | str, path: str) -> dict[str, Any]:
    """The object that a JSON text is. Raises `FormatError`, which names `path`."""
    value = parse(text, path)
    if not isinstance(value, dict):
        raise FormatError("its JSON is not an object.", path=path)
    return value


def parse(text: bytes | str, path: str) -> Any:
    """The value of a JSON text. Raises `FormatError`, which names `path`."""
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    check_budget(data, path)
    try:
        value = _decoded(data)
        members = _members(value)
    except (ValueError, RecursionError) as error:
        raise _unreadable(error, path) from None
    check_members(data, members, path)
    return value


def parse_as(text: bytes | msgspec.Raw, type_: type[T], path: str) -> T:
    """The value of a JSON text as a type of msgspec; no budget, and keys may occur twice."""
    try:
        return msgspec.json.decode(text, type=type_)
    except (ValueError, RecursionError) as error:
        raise _unreadable(error, path) from None


def parse_records(text: bytes, type_: type[Record], path: str) -> dict[str, Record]:
    """The members of an object, whose budget was checked, each with all fields of a record.

    Raises `FormatError`, also where a member has other fields besides.
    """
    found = parse_as(text, dict[str, type_], path)  # type: ignore[valid-type]
    check_members(text, len(found) * (1 + len(msgspec.structs.fields(type_))), path)
    return found


def check_budget(text: bytes, path: str, token_nbytes: int = _TOKEN_NBYTES) -> None:
    """Raise `FormatError` for a text with a byte order mark, or one too large once parsed.

    `token_nbytes` is what its values take for each comma, colon and opening bracket.
    """
    if text.startswith(_BOM):
        raise FormatError(
            "it begins with a byte order mark, which transformers does not accept.",
            path=path,
            hint="Save it as UTF-8 without one.",
        )
    tokens = sum(text.count(mark) for mark in _PUNCTUATION)
    width = 1 if text.isascii() and b"\\u" not in text else 4 if _WIDE.search(text) else 2
    held = len(text) * (1 + width) + tokens * token_nbytes
    if held > _MAX_HELD:
        raise FormatError(
            f"its JSON has {len(text)} bytes and {tokens} items, more than reshard reads.",
            path=path,
            hint="It is damaged or was crafted to exhaust memory.",
        )


def check_members(text: bytes, members: int, path: str) -> None:
    """Raise `FormatError` where a text has more keys than the `members` that were parsed of it."""
    if not has_keys(text, members):
        raise FormatError(
            "its JSON cannot be read: a key occurs twice.",
            path=path,
            hint="It is damaged or was edited by hand; remove one of the two.",
        )


def has_keys(text: bytes, count: int) -> bool:
    """Whether all objects of a valid JSON text have `count` keys together."""
    # Nearly always every colon is one after a key, which proves it in a tenth of the time.
    return text.count(b":") == count or count_keys(text) == count


def count_keys(text: bytes) -> int:
    """The keys of all objects of a valid JSON text, each as often as it occurs.

    >>> count_keys(b'{"a": ":", "b": {"a": 1, "a": 2}}')
    4
    """
    return sum(match.end(1) > match.start(1) for match in _KEY.finditer(text))


def _decoded(text: bytes) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        # What Python accepts besides: NaN, Infinity, numbers beyond 64 bits.
        if len(text) > MAX_CONFIG:
            raise
        try:
            value = json.loads(text.decode("utf-8"))
        except RecursionError:
            raise
        except ValueError:
            value = None
        if value is None:
            raise
        json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is a ValueError
        return value


def _members(value: Any) -> int:
    """The members of all objects in a value. Raises `ValueError` where it is nested too deeply."""
    members = depth = 0
    level = [value]
    while level:
        inner: list[Any] = []
        for item in level:
            if type(item) is dict:
                members += len(item)
                inner.extend(v for v in item.values() if type(v) is dict or type(v) is list)
            elif type(item) is list:
                inner.extend(v for v in item if type(v) is dict or type(v) is list)
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
        level = inner
    return members


def _unreadable(error: Exception, path: str) -> FormatError:
    what = "it is nested too deeply" if isinstance(error, RecursionError) else error
    return FormatError(f"its JSON cannot be read: {what}.", path=path)
