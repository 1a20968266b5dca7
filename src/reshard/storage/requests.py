"""Count what stores are asked for: requests cost time, and money.

Requests that a store's client repeats by itself, after an error of the server, count once.
"""

from __future__ import annotations

import threading

from msgspec import Struct
from msgspec.structs import asdict

from reshard.core.sizes import size


class Requests(Struct, frozen=True):
    """Requests by kind, and the bytes that went through.

    `get` are reads of a range, `head` questions for one object, `list` pages of names, `put` writes
    (each part of a multipart upload is one, as are its begin and end), `delete` deletions.
    `repeated` are reads that broke off and were made again.
    """

    get: int = 0
    head: int = 0
    list: int = 0
    put: int = 0
    delete: int = 0
    repeated: int = 0
    bytes_read: int = 0
    bytes_written: int = 0

    def __sub__(self, other: Requests) -> Requests:
        mine, theirs = asdict(self), asdict(other)
        return Requests(**{name: mine[name] - theirs[name] for name in mine})

    @property
    def number(self) -> int:
        """All requests."""
        return self.get + self.head + self.list + self.put + self.delete

    def __str__(self) -> str:
        kinds = ("get", "head", "list", "put", "delete")
        counts = ", ".join(f"{getattr(self, kind)} {kind.upper()}" for kind in kinds
                           if getattr(self, kind))  # fmt: skip
        again = f", {self.repeated} repeated" if self.repeated else ""
        moved = [f"{size(self.bytes_read)} read"] if self.bytes_read else []
        moved += [f"{size(self.bytes_written)} written"] if self.bytes_written else []
        return f"{self.number} to stores ({counts}{again}); {', '.join(moved) or 'no bytes'}"


_counting = threading.Lock()
_total = Requests()


def count(**more: int) -> None:
    """Add to the counts of this process."""
    global _total
    with _counting:
        now = asdict(_total)
        _total = Requests(**{name: now[name] + more.get(name, 0) for name in now})


def add(others: Requests) -> None:
    """Add what another process asked."""
    count(**asdict(others))


def total() -> Requests:
    """What this process asked of stores so far; the difference of two is what a piece of work
    did."""
    return _total


def since(before: Requests) -> Requests | None:
    """What this process asked of stores after `total` was `before`; None for nothing."""
    asked = _total - before
    return asked if asked.number else None
