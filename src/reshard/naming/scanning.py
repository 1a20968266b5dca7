"""Very many names, a few thousand at a time: whether any of them contains some text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

# Names that are searched as one text: 300,000 may have 80 MB.
_AT_ONCE = 4096


def any_contains(names: Iterable[str], texts: Iterable[str]) -> bool:
    """Whether one of the names contains one of the texts; also true, in vain, for a text that ends
    in one name and begins in the one before, which takes a line break in it.

    A search in thousands of names that are joined takes a tenth of the time of one in each.

    >>> any_contains(["model.norm.weight", "model.lora_A.weight"], ["lora_", "ia3_"])
    True
    """
    sought = tuple(texts)
    for some in batched(names, _AT_ONCE):
        joined = "\n".join(some)
        if any(text in joined for text in sought):
            return True
    return False


def batched(names: Iterable[str], count: int) -> Iterator[list[str]]:
    """The names, at most so many at a time.

    >>> list(batched("abc", 2))
    [['a', 'b'], ['c']]
    """
    rest = iter(names)
    while some := [*islice(rest, count)]:
        yield some
