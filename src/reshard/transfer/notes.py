"""The journal of an output in a store: its lines, as objects that are each written once.

    OUT/reshard.partial.00001    the lines of a journal (`journal`), from its opening on
    OUT/reshard.partial.00002    more of them

A line is of use once its file is an object: `Sealed` says which, by the store's tag. Lines wait
until files of `_STEP` bytes are whole, or for the run's next sign of life.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Mapping

from reshard.core.locations import MARKS
from reshard.errors import WriteError
from reshard.storage.stores import Object
from reshard.transfer.journal import (
    Basis,
    Noted,
    Piece,
    Sealed,
    encoded,
    encoded_piece,
    opening,
    text_of,
)

# Bytes of whole files after which lines are written.
_STEP = 256 << 20
#: Writes an object of this name.
Put = Callable[[str, bytes], object]


class Notes:
    """The journal of one run in a store. Safe to use from threads.

    `noted` is what an interrupted run left, in the objects of `earlier`, by name. Raises
    `StaleError` where they are of another conversion.
    """

    def __init__(self, put: Put, basis: Basis, earlier: Mapping[str, bytes] | None = None) -> None:
        self.noted: Noted | None = None
        self.sources = sorted(basis.sources)
        self._put = put
        self._number = 0
        self._opening = opening(basis) if earlier is None else b""
        self._waiting: list[bytes] = []
        self._passed = 0
        self._writing = threading.Lock()
        if earlier is not None:
            names = sorted(earlier)
            self.noted = Noted(io.BytesIO(b"".join(earlier[name] for name in names)), basis)
            self._number = max(int(name.removeprefix(MARKS)) for name in names)
            if self.noted.damaged:
                self._cut(self.noted.nbytes, earlier)

    @staticmethod
    def is_one(name: str) -> bool:
        """Whether an object of this name holds lines."""
        return name.startswith(MARKS) and name.removeprefix(MARKS).isdecimal()

    def note(self, piece: Piece, nbytes: int) -> None:
        """Note a finished piece."""
        if line := encoded_piece(piece):
            self._add(line)

    def seal(self, name: str, object_: Object) -> None:
        """Note that a file is an object, whose pieces were noted before."""
        self._add(encoded(Sealed(text_of(name), object_.nbytes, object_.tag)), object_.nbytes)

    def flush(self) -> None:
        """Write the lines that wait. A journal that cannot be written ends."""
        with self._writing:
            self._flush()

    def _cut(self, nbytes: int, earlier: Mapping[str, bytes]) -> None:
        """Cut off what is not whole after the first `nbytes` bytes: lines follow it."""
        at = 0
        for name in sorted(earlier):
            if at + len(earlier[name]) > nbytes:
                self._put(name, earlier[name][: nbytes - at])
                return
            at += len(earlier[name])

    def _add(self, line: bytes, nbytes: int = 0) -> None:
        with self._writing:
            self._waiting.append(line)
            self._passed += nbytes
            if self._passed >= _STEP:
                self._flush()

    def _flush(self) -> None:
        if not self._waiting:
            return
        text = b"".join((self._opening, *self._waiting))
        self._opening, self._waiting, self._passed = b"", [], 0
        self._number += 1
        try:
            self._put(f"{MARKS}{self._number:05d}", text)
        except WriteError:
            self._put = _nowhere


def _nowhere(name: str, text: bytes) -> None:
    """Where lines go after some could not be written."""
