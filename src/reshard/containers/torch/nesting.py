"""The proof that a value is not nested too deeply, and is no larger than its pickle."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

from reshard.containers.torch.limits import MAX_DEPTH, MAX_VALUES, MAX_VALUES_PER_BYTE
from reshard.containers.torch.records import Opaque
from reshard.errors import UnsupportedError

#: What holds other values.
HOLDING = frozenset({dict, list, tuple, Opaque})
# Items of a recalled container that may be as many as the bytes that recall it. A container with
# more is looked into once and noted, however often it is met.
_FEW = 8
# Records that their readers keep: one of 100,000 ranks is recalled by every tensor.
_KEPT = "DeviceMesh"


def check_depth(value: object, *, path: str) -> None:
    """Raise `UnsupportedError` where containers nest deeper than `MAX_DEPTH`.

    Looks into dicts, lists and tuples, not into records. A container that holds itself, as a
    user's own state may, counts once.
    """
    # Depth first, without recursion. A container is open (height 0) until all in it have been
    # seen; then its height is known. What is open is the path from the root.
    heights: dict[int, int] = {}
    depth = 0
    todo: list[object] = [value]
    while todo:
        container = todo[-1]
        state = heights.get(id(container))
        if state:
            todo.pop()
            continue
        inner = _containers_in(container)
        # Short innermost ones, which are nearly all of a large pickle, are not noted: their height
        # is 1.
        deep = [item for item in inner if len(item) > _FEW or _holds_containers(item)]
        if state is None:
            heights[id(container)] = 0
            depth += 1
            if depth + bool(inner) > MAX_DEPTH:
                raise _too_deep(path)
            todo.extend(item for item in deep if id(item) not in heights)
            continue
        todo.pop()
        depth -= 1
        height = 1 + max((heights[id(item)] for item in deep), default=0)
        height = max(height, 2 if inner else 1)
        if height > MAX_DEPTH:
            raise _too_deep(path)
        heights[id(container)] = height


def check_sharing(value: object, recalled: Iterable[object], nbytes: int, *, path: str) -> None:
    """Raise `UnsupportedError` where a pickle of `nbytes` stands for many more values.

    `recalled` are the containers and records that it recalls of its memo. Looks into records too,
    once where their readers do. What is met inside itself counts as one value.
    """
    if all(map(_is_small, recalled)):
        return
    # As above: open values (0) count 1, and short ones that hold no others are not noted.
    counts: dict[int, int] = {}
    kept = 0
    todo: list[object] = [value]
    while todo:
        one = todo[-1]
        known = counts.get(id(one))
        if known:
            todo.pop()
            continue
        items = _items_of(one)
        inner = [item for item in items if type(item) in HOLDING]
        deep = [item for item in inner if _holds_others(item)]
        if known is None:
            counts[id(one)] = 0
            todo.extend(item for item in deep if id(item) not in counts)
            continue
        todo.pop()
        count = 1 + len(items) + sum(counts[id(item)] or 1 for item in deep)
        if len(deep) < len(inner):
            count += sum(1 + len(_items_of(item)) for item in inner if not _holds_others(item))
        counts[id(one)] = count
        if type(one) is Opaque and one.short_name == _KEPT:
            kept += count
            counts[id(one)] = 1
        check_count(max(count, kept), nbytes, path=path)


def check_count(count: int, nbytes: int, *, path: str) -> None:
    """Raise `UnsupportedError` where a pickle of `nbytes` stands for so many values."""
    limit = MAX_VALUES + MAX_VALUES_PER_BYTE * nbytes
    if count > limit:
        raise UnsupportedError(
            f"its pickle of {nbytes} bytes stands for more than {limit} values: it repeats its "
            "parts over and over.",
            path=path,
            hint="No training framework writes such a file.",
        )


def _too_deep(path: str) -> UnsupportedError:
    return UnsupportedError(f"its pickle nests deeper than {MAX_DEPTH} levels.", path=path)


def _items_in(value: object) -> Iterable[Any]:
    """What a dict, list or tuple holds, without the keys of a dict."""
    if type(value) is dict:
        return value.values()
    return value if type(value) is list or type(value) is tuple else ()


def _containers_in(value: object) -> list[Any]:
    return [item for item in _items_in(value) if type(item) in (dict, list, tuple)]


def _holds_containers(value: object) -> bool:
    """Whether `_containers_in` gives any."""
    return any(type(item) in (dict, list, tuple) for item in _items_in(value))


def _items_of(value: object) -> list[object]:
    """What a container or record holds, without the keys of a dict."""
    if type(value) is dict:
        return list(value.values())
    if isinstance(value, Opaque):
        return [*value.args, value.state, *(value.items or ())]
    return list(value) if isinstance(value, list | tuple) else []


def _holds_others(value: object) -> bool:
    """Whether a container or record has many items, or stands for more than these."""
    if type(value) is Opaque:
        if type(value.state) in HOLDING or value.name.endswith(_KEPT):
            return True
        parts: tuple[Any, ...] = (value.args, value.items or ())
    else:
        parts = (value.values() if type(value) is dict else value,)
    return sum(map(len, parts)) > _FEW or any(type(item) in HOLDING for item in chain(*parts))


def _is_small(value: object) -> bool:
    """Whether a value holds a few others, none of which holds more."""
    items = _items_of(value)
    return len(items) <= _FEW and not any(
        type(item) in HOLDING and _items_of(item) for item in items
    )
