"""The number of token ids of a `tokenizer.json`, read without its merges, which take most memory.

    {"added_tokens": [{"id": 5, "content": "<s>"}, ..], "model": {"vocab": ..., "merges": [..]}}

`vocab` is {token: id}; of a Unigram model, [[token, score], ..] in the order of the ids.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from msgspec import Raw

from reshard.errors import FormatError, ReshardError
from reshard.storage import strict_json
from reshard.storage.local import Sources, child

_NAME = "tokenizer.json"
# Bytes, and keys of all objects. The largest vocabularies have 262,144 tokens in 33 MB.
_MAX_NBYTES, _MAX_KEYS = 48 << 20, 800_000
_Object = dict[str, Raw]


def count(folder: Path, sources: Sources) -> int | None:
    """One more than the largest token id; None where there is no file that states one."""
    try:
        source = sources.open(child(folder, _NAME, store=True))
        text = strict_json.read_whole(source, max_nbytes=_MAX_NBYTES)
        return _count(text)
    except ReshardError:
        return None


def _count(text: bytes) -> int:
    if text.count(b":") > _MAX_KEYS:
        raise FormatError(f"it has more than {_MAX_KEYS} keys.", path=_NAME)
    fields = strict_json.parse_as(text, _Object, _NAME)
    ids: list[Any] = []
    vocabulary = _object(fields.get("model")).get("vocab")
    if vocabulary is not None and bytes(vocabulary)[:1] == b"{":
        found = strict_json.parse_as(vocabulary, dict[str, int], _NAME)
        strict_json.check_members(bytes(vocabulary), len(found), _NAME)
        ids += found.values()
    elif vocabulary is not None and bytes(vocabulary)[:1] == b"[":
        ids.append(_length(bytes(vocabulary)) - 1)
    if bytes(fields.get("added_tokens", b""))[:1] == b"[":
        added = strict_json.parse(bytes(fields["added_tokens"]), _NAME)
        ids += [token.get("id") for token in added if isinstance(token, dict)]
    return max((i for i in ids if isinstance(i, int)), default=-1) + 1


def _object(raw: Raw | None) -> _Object:
    if raw is None or bytes(raw)[:1] != b"{":
        return {}
    return strict_json.parse_as(raw, _Object, _NAME)


def _length(text: bytes) -> int:
    """The items of a list of lists."""
    if text.count(b",") > 2 * _MAX_KEYS or text.count(b"[") > _MAX_KEYS:
        raise FormatError(f"it has more than {_MAX_KEYS} tokens.", path=_NAME)
    return len(strict_json.parse_as(text, list[Raw], _NAME))
