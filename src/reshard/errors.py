"""All errors of reshard, as one tree of classes.

    ReshardError
    ├── NotFoundError       nothing that can be read lies where the user pointed
    ├── FormatError         a file breaks the rules of its own format
    ├── IncompleteError     a part of the checkpoint is missing, short or from another save
    ├── UnsupportedError    recognised, but not supported; the message says what
    ├── NamesError          the checkpoint's tensors and the base model's do not match
    ├── PlanError           the conversion asked for cannot be planned
    │   └── OptionError     an option's value is malformed, or it has no effect here
    ├── WriteError          the output cannot be written
    └── VerificationError   what was written is not what was read

A message says what is wrong, `path` and `tensor` say where, `hint` says how to fix it. The
command line prints exactly that and exits with 1, with 2 for an `OptionError`; a traceback is
shown only with `--debug`.
"""

from __future__ import annotations

import os
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from msgspec import Struct, field

# Characters of a tensor's name in a message, and of a message: a file's names may be of any length.
_MAX_NAME, _MAX_MESSAGE = 200, 10_000
# Names in a row of a report.
_SHOWN = 5


class ReshardError(Exception):
    """The root of all stated failures.

    Parameters
    ----------
    message: what is wrong, with both numbers where two numbers disagree.
    path: the file or folder at fault.
    tensor: the tensor's name in the checkpoint.
    hint: what the user can do about it.

    `also` are other errors of the same command.
    """

    also: tuple[ReshardError, ...] = ()

    def __init__(
        self,
        message: str,
        *,
        path: str | os.PathLike[str] | None = None,
        tensor: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.path: str | None = None if path is None else os.fspath(path)
        self.tensor = tensor
        self.hint = hint

    def __str__(self) -> str:
        where = ""
        if self.tensor is not None:
            more = "..." if len(self.tensor) > _MAX_NAME else ""
            where += f"tensor {self.tensor[:_MAX_NAME] + more!r}: "
        if self.path is not None:
            path = os.fspath(self.path)
            # A space at its end is not seen without quotes.
            where = f"{path if path == path.strip() else repr(path)}: {where}"
        message = printable(shortened(self.message), lines=isinstance(self.message, Lines))
        hint = printable(self.hint) if self.hint else ""
        between = " " if hint and not message.endswith("\n") else ""
        return f"{printable(where)}{message}{between}{hint}"


@contextmanager
def at(path: str | os.PathLike[str]) -> Iterator[None]:
    """Add `path` to an error that is raised inside and names no path."""
    try:
        yield
    except ReshardError as error:
        error.path = error.path or os.fspath(path)
        raise


_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = _MAX_NAME


def brief(value: object) -> str:
    """A value of a file for a message: short, whatever it is.

    A list of two of the list before, a hundred times over, is a small file and an endless text.
    """
    return _BRIEF.repr(value)


class Lines(str):
    """A message whose line breaks are ours: all text from a file in it went through `printable`."""

    __slots__ = ()


def printable(text: str, *, lines: bool = False) -> str:
    r"""Text of a file as it may be shown: what would steer a terminal is spelt out.

    So is a line break, which would forge a row or a line of ours, unless `lines` says that all of
    them are ours.

    >>> printable("a\x1b[31m b"), printable("a\nb: float32")
    ('a\\x1b[31m b', 'a\\nb: float32')
    """
    if text.isprintable():
        return text
    kept = "\n" if lines else ""
    return "".join(c if c.isprintable() or c == kept else repr(c)[1:-1] for c in text)


def shortened(text: str, limit: int = _MAX_MESSAGE) -> str:
    """A text of at most `limit` characters: a file may make it as long as it likes.

    >>> shortened("abcdef", 4)
    'abcd...'
    """
    return text if len(text) <= limit else f"{text[:limit]}..."


def shown(name: str) -> str:
    r"""A name from a file, for a text of ours: short, on one line.

    >>> shown("a\nb")
    'a\\nb'
    """
    return printable(shortened(name, _MAX_NAME))


def listed(names: Iterable[str], limit: int = 8) -> str:
    """The first few names, and how many there are more.

    >>> listed("abcd", 2)
    'a, b and 2 more'
    """
    every = list(names)
    more = f" and {len(every) - limit} more" if len(every) > limit else ""
    return ", ".join(map(shown, every[:limit])) + more


def is_of_system(error: ReshardError) -> bool:
    """Whether the system did not show what is there (a disk that fails, no permission), so that the
    error says nothing of the file's content: its cause is then an `OSError`."""
    return isinstance(error.__cause__, OSError)


class NotFoundError(ReshardError):
    """The path contains nothing that reshard can read."""


class FormatError(ReshardError):
    """A file breaks the rules of its own format."""


class IncompleteError(ReshardError):
    """A part of the checkpoint is missing, short, or from another save."""


class UnsupportedError(ReshardError):
    """The input is recognised but not supported; the message says what is not."""


class Resize(Struct, frozen=True):
    """A vocabulary of `rows` rows where the base has `base_rows`."""

    name: str
    base_rows: int
    rows: int

    def __str__(self) -> str:
        return f"{self.name}: {self.base_rows} rows to {self.rows}"


class Matching(Struct, frozen=True):
    """How a checkpoint's tensors and the base's match; the names are the output's but for those of
    `unexpected`, which are the checkpoint's.

    missing: tensors of the base that are not written. filled: those that are copied from it.
    unexpected: tensors of the checkpoint that are not written.
    tied: a name that is not stored -> the name that its weights are stored under.
    resized: tensors with another number of vocabulary rows than the base's.
    """

    missing: tuple[str, ...] = ()
    filled: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    tied: Mapping[str, str] = field(default_factory=dict)
    resized: tuple[Resize, ...] = ()

    def rows(self) -> list[tuple[str, str]]:
        """The matching as lines of a label and its words; what is empty has none."""
        rows = [("tied", listed(f"{a} = {b}" for a, b in self.tied.items()))] if self.tied else []
        for what in ("filled", "missing", "unexpected"):
            names: tuple[str, ...] = getattr(self, what)
            if names:
                rows.append((what, f"{len(names)}: {listed(names, _SHOWN)}"))
        return [*rows, ("resized", listed(map(str, self.resized)))] if self.resized else rows

    def to_json(self) -> dict[str, Any]:
        """The matching as JSON values; `resized` is left out where nothing is."""
        resized = {"resized": [str(one) for one in self.resized]} if self.resized else {}
        return {
            "tied": dict(self.tied),
            "filled": list(self.filled),
            "missing": list(self.missing),
            "unexpected": list(self.unexpected),
            **resized,
        }


class NamesError(ReshardError):
    """The checkpoint's tensors and the base model's do not match, name for name.

    `matching` lists them: its `missing` are tensors of the base that the checkpoint does not have,
    its `unexpected` are tensors of the checkpoint that the base does not have.
    """

    def __init__(
        self,
        message: str,
        *,
        missing: tuple[str, ...] = (),
        unexpected: tuple[str, ...] = (),
        path: str | os.PathLike[str] | None = None,
        tensor: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, path=path, tensor=tensor, hint=hint)
        # A refused conversion fills and ties nothing.
        self.matching: Matching = Matching(missing=missing, unexpected=unexpected)

    @property
    def missing(self) -> tuple[str, ...]:
        return self.matching.missing

    @property
    def unexpected(self) -> tuple[str, ...]:
        return self.matching.unexpected


class PlanError(ReshardError):
    """The requested conversion cannot be planned."""


class OptionError(PlanError):
    """An option's value is malformed, or the option has no effect here; exit code 2.

    `option` is the option's name in Python, where one is at fault.
    """

    def __init__(
        self,
        message: str,
        *,
        option: str | None = None,
        path: str | os.PathLike[str] | None = None,
        tensor: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, path=path, tensor=tensor, hint=hint)
        self.option = option


class WriteError(ReshardError):
    """The output cannot be written; what stands under its name is what stood there before."""


class VerificationError(ReshardError):
    """The output differs from what was read."""
