"""Records of a run as columns: what stands for them until their reader takes them.

A run of 500 records is one or two `Rows` on the machine's stack, so nothing is made for each. Only
a compactor knows what to do with them. Where anything else gets them, the pickle is read again
without them (`RecalledError`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from msgspec import Struct

from reshard.containers.torch.memo import RecalledError
from reshard.containers.torch.records import Instance

if TYPE_CHECKING:
    import numpy as np

    Numbers: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]

Shape = tuple[int, ...]


class Size(Struct, frozen=True, eq=False):
    """A column of sizes: a column for each dimension, of natural numbers."""

    dims: tuple[Numbers, ...]


class Constant(Struct, frozen=True, eq=False):
    """A column of which every value is the same."""

    value: object


#: The values of a field: numbers, texts, sizes, or one constant.
Column: TypeAlias = "Numbers | list[str] | Size | Constant"


class Ledger:
    """Counts the `Rows` of a pickle that nobody took yet, and those of them that lie in lists."""

    __slots__ = ("extra", "listed", "open", "stack")

    def __init__(self) -> None:
        self.open = 0
        self.listed = 0
        # Records beyond the entries that stand for them, on this stack of the machine.
        self.stack: list[object] | None = None
        self.extra = 0


class Rows:
    """Records of one class that are spelt alike.

    `alternate`: records of another class stand between them, one by one, which are `Rows` of their
    own.
    """

    __slots__ = ("_columns", "_count", "_ledger", "_listed", "_taken", "alternate", "keys", "name")

    def __init__(
        self,
        name: str,
        keys: tuple[str, ...],
        columns: tuple[Column, ...],
        count: int,
        ledger: Ledger,
        *,
        alternate: bool,
    ) -> None:
        self.name = name
        self.keys = keys
        self.alternate = alternate
        self._columns = columns
        self._count = count
        self._ledger = ledger
        self._listed = self._taken = False
        ledger.open += 1

    def __len__(self) -> int:
        return self._count

    def take(self) -> None:
        """Note that a reader has what these records say."""
        if not self._taken:
            self._taken = True
            self._ledger.open -= 1
            self._ledger.listed -= self._listed

    def listed(self) -> None:
        """Note that they are in a list."""
        if not self._listed and not self._taken:
            self._listed = True
            self._ledger.listed += 1

    def numbers(self, key: str, start: int, stop: int) -> Numbers | None:
        """A field of records `[start, stop)`; None where it is not of numbers."""
        column = self._column(key)
        if column is None or isinstance(column, list | Size | Constant):
            return None
        return column[start:stop]

    def texts(self, key: str, start: int, stop: int) -> list[str] | None:
        """A field of records `[start, stop)`; None where it is not of texts."""
        column = self._column(key)
        return column[start:stop] if isinstance(column, list) else None

    def sizes(self, key: str, start: int, stop: int) -> list[Shape] | None:
        """A field of records `[start, stop)`; None where it is not of sizes."""
        column = self._column(key)
        if not isinstance(column, Size):
            return None
        dims = [dim[start:stop] for dim in column.dims]
        if all((dim == dim[0]).all() for dim in dims):
            return [tuple([int(dim[0]) for dim in dims])] * (stop - start)
        return [*zip(*(dim.tolist() for dim in dims), strict=True)]

    def lacks(self, key: str) -> bool:
        """Whether no record says anything of a field: it is missing, None or False."""
        column = self._column(key)
        return column is None or (isinstance(column, Constant) and not column.value)

    def record(self, number: int) -> Instance:
        """One of the records."""
        values: list[object] = []
        for column in self._columns:
            if isinstance(column, Size):
                values.append(tuple([int(dim[number]) for dim in column.dims]))
            elif isinstance(column, Constant):
                values.append(column.value)
            elif isinstance(column, list):
                values.append(column[number])
            else:
                values.append(int(column[number]))
        return Instance(self.name, self.keys, tuple(values))

    def _column(self, key: str) -> Column | None:
        return self._columns[self.keys.index(key)] if key in self.keys else None


def pieces(values: Sequence[object]) -> Iterator[tuple[object, int, int]]:
    """Each value with the records `[start, stop)` of it: all of `Rows`, and one of others."""
    for value in values:
        yield value, 0, len(value) if isinstance(value, Rows) else 1


def aligned(
    first: Sequence[object], second: Sequence[object]
) -> Iterator[tuple[tuple[object, int, int], tuple[object, int, int]]]:
    """Two sequences of equally many records, in pieces of equally many: each a value, and which
    records of it. Raises `RecalledError` where they are not equally many."""
    others = pieces(second)
    value, start, stop = next(others, (None, 0, 0))
    for one, begin, end in pieces(first):
        while begin < end:
            if start == stop:
                value, start, stop = next(others, (None, 0, 0))
                if start == stop:
                    raise RecalledError
            count = min(end - begin, stop - start)
            yield (one, begin, begin + count), (value, start, start + count)
            begin, start = begin + count, start + count
    if start < stop or next(others, None) is not None:
        raise RecalledError


def each(piece: tuple[object, int, int]) -> list[object]:
    """The records of a piece, made one by one."""
    value, start, stop = piece
    if isinstance(value, Rows):
        return [value.record(number) for number in range(start, stop)]
    return [value]
