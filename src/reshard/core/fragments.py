"""Questions about the fragments of tensors, listed or described by numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from reshard.core.tensors import Entry, Extent, Fragment, Fragments, Portion


def strided(entry: Entry) -> bool:
    """Whether some of it is stored in another order than row-major."""
    if isinstance(entry.fragments, Fragments):
        return False
    return any(fragment.strides for fragment in entry.fragments)


def computed(entry: Entry) -> bool:
    """Whether some of it is computed."""
    if isinstance(entry.fragments, Fragments):
        return False
    return any(isinstance(fragment.extent, Portion) for fragment in entry.fragments)


def longest(entry: Entry) -> int:
    """Bytes of its longest fragment."""
    if isinstance(entry.fragments, Fragments):
        return entry.fragments.longest
    return max((fragment.extent.nbytes for fragment in entry.fragments), default=0)


def within(entry: Entry, start: int, stop: int) -> Iterable[Fragment]:
    """Its fragments, without those that surely hold none of the elements `[start, stop)` of the
    flattened tensor."""
    if isinstance(entry.fragments, Fragments):
        return entry.fragments.within(start, stop)
    return entry.fragments


def regions(entries: Iterable[Entry]) -> Iterator[Extent]:
    """The files' bytes that tensors are made of, with those behind computed tensors.

    A flat tensor that others are cut out of comes once. Other bytes may come twice.
    """
    seen: set[int] = set()  # by id: what is seen stays alive, because the entries hold it
    todo = [iter(entries)]
    while todo:
        entry = next(todo[-1], None)
        if entry is None:
            todo.pop()
        elif isinstance(entry.fragments, Fragments):
            found = entry.fragments.regions()
            if id(found) not in seen:
                seen.add(id(found))
                yield from found.extents()
        else:
            for fragment in entry.fragments:
                if isinstance(fragment.extent, Extent):
                    yield fragment.extent
                else:
                    todo.append(iter(fragment.extent.source.inputs))
