"""The proof that a value is not nested too deeply."""

from __future__ import annotations

from reshard.containers.torch.limits import MAX_DEPTH
from reshard.errors import UnsupportedError


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
        if state is None:
            heights[id(container)] = 0
            depth += 1
            if depth > MAX_DEPTH:
                raise _too_deep(path)
            todo.extend(item for item in inner if id(item) not in heights)
            continue
        todo.pop()
        depth -= 1
        height = 1 + max((heights[id(item)] for item in inner), default=0)
        if height > MAX_DEPTH:
            raise _too_deep(path)
        heights[id(container)] = height


def _too_deep(path: str) -> UnsupportedError:
    return UnsupportedError(f"its pickle nests deeper than {MAX_DEPTH} levels.", path=path)


def _containers_in(value: object) -> list[object]:
    if type(value) is dict:
        return [item for item in value.values() if type(item) in (dict, list, tuple)]
    if type(value) is list or type(value) is tuple:
        return [item for item in value if type(item) in (dict, list, tuple)]
    return []
