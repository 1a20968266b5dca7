"""The proof that the parts of a tensor hold every element of it exactly once.

How often each element is held is a function on the tensor: the sum of the parts' indicators. It is
1 everywhere exactly where its mixed difference is that of the whole tensor, and the difference of a
box lives on its corners, with alternating signs:

    + . . -        a box [lo, hi) in two dimensions: + at (lo, lo) and (hi, hi), - at the other two
    . . . .
    - . . +        of parts that tile, all corners cancel but those of the whole tensor

So n parts that are cut along d dimensions are proven in n * 2^d steps, however they are laid out:
in rows, grids, spirals, pinwheels. Where d is large, the sum over the corners is not written out:
it is a product over the dimensions, and is compared at random numbers instead.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Iterable, Sequence
from itertools import product

from reshard.core.strides import span
from reshard.core.tensors import (
    Box,
    Entry,
    Extent,
    Fragment,
    Shape,
    Single,
    TensorKind,
    TensorSpec,
    stored,
    whole,
)
from reshard.errors import FormatError, IncompleteError

# Corners that are written out, at most: 0.5 s and, if none cancel, 150 MB. 32,768 parts of a tensor
# may be cut along five dimensions, which is as many as a mesh of devices has.
_MAX_CORNERS = 1 << 20
# A prime. Two sums that differ are equal at random numbers below it with a probability of
# 32 dimensions / 2^127.
_PRIME = (1 << 127) - 1
# Pairs of parts that are compared in search of two to name in an error: 0.2 s.
_MAX_PAIRS = 1 << 17


def check_tiling(entry: Entry) -> None:
    """Prove that the fragments hold every element of the tensor exactly once.

    Raises `FormatError` (a box that leaves the tensor, bytes that do not fit their box, two boxes
    that overlap) or `IncompleteError` (a hole).
    """
    spec, over = entry.spec, entry.over
    if over not in (spec.shape, (spec.numel,)):
        raise FormatError(f"its parts are of shape {over}, it is {spec.shape}.", tensor=spec.name)
    for fragment in entry.fragments:
        _check_fragment(spec, fragment, over)
    boxes = [fragment.box for fragment in entry.fragments if fragment.box.numel]
    numel = sum(box.numel for box in boxes)
    if numel == spec.numel and tiles(boxes, over):
        return
    pair = overlapping(boxes)
    if pair is not None:
        raise FormatError(
            f"two parts hold the same elements: {_describe(pair[0])} and {_describe(pair[1])}.",
            tensor=spec.name,
        )
    if numel >= spec.numel:
        raise FormatError(
            f"some of its {len(boxes)} parts hold the same elements: {numel} for {spec.numel}.",
            tensor=spec.name,
        )
    raise IncompleteError(
        f"{numel} of its {spec.numel} elements are in the checkpoint.",
        tensor=spec.name,
        hint="A rank's part is missing.",
    )


def proven(
    spec: TensorSpec,
    fragments: Iterable[Fragment],
    kind: TensorKind = "parameter",
    aliases: tuple[str, ...] = (),
) -> Entry:
    """The entry of these fragments, which must tile it; raises as `check_tiling` does."""
    entry = Entry(spec, tuple(fragments), kind, aliases)
    check_tiling(entry)
    return entry


def stored_whole(spec: TensorSpec, extent: Extent, kind: TensorKind = "parameter") -> Entry:
    """The entry of a tensor that lies in `extent` from its first element to its last, row-major.

    Raises `FormatError` where the extent has another size.
    """
    numel = spec.numel
    if extent.nbytes != numel * spec.dtype.itemsize:
        fragment = Fragment(whole(spec.shape), extent, spec.dtype)
        return proven(spec, (fragment,), kind)  # says what is wrong with it
    if not numel:
        return Entry(spec, (), kind)
    return Entry(spec, Single(extent.file, extent.offset, whole(spec.shape), spec.dtype), kind)


def tiles(boxes: Sequence[Box], shape: Shape) -> bool:
    """Whether boxes inside an array of `shape` hold each of its elements exactly once.

    >>> tiles([Box((3,), (0,), (2,)), Box((3,), (2,), (1,))], (3,))
    True
    >>> tiles([Box((3,), (0,), (2,)), Box((3,), (1,), (1,))], (3,))
    False
    """
    if 0 in shape:
        return not boxes
    # Along the others every part reaches from end to end, and so do its corners.
    cut = [dim for dim, size in enumerate(shape) if any(box.sizes[dim] != size for box in boxes)]
    if len(boxes) << len(cut) <= _MAX_CORNERS:
        return _corners_cancel(boxes, shape, cut)
    return _sums_agree(boxes, shape, cut)


def is_grid(offsets: Sequence[Shape], sizes: Sequence[Shape], shape: Shape) -> bool:
    """Whether the parts are all those of an even grid, each once: they then tile the array. Other
    parts may tile it, too.

    >>> is_grid([(0, 0), (2, 0)], [(2, 3), (2, 3)], (4, 3))
    True
    """
    if len(set(sizes)) != 1 or len(set(offsets)) != len(offsets):
        return False
    size = sizes[0]
    if 0 in size or len(offsets) * math.prod(size) != math.prod(shape):
        return False
    # Each begins at a corner of the grid, no two at the same, and they are as many as its corners.
    columns = map(set, zip(*offsets, strict=True))
    return all(
        limit % step == 0 and all(start in range(0, limit, step) for start in starts)
        for starts, step, limit in zip(columns, size, shape, strict=True)
    )


def _corners_cancel(boxes: Sequence[Box], shape: Shape, cut: Sequence[int]) -> bool:
    signs = [(-1) ** bin(number).count("1") for number in range(1 << len(cut))]
    left: dict[tuple[int, ...], int] = {}
    for corner, sign in zip(product(*((0, shape[dim]) for dim in cut)), signs, strict=True):
        left[corner] = -sign
    for box in boxes:
        ends = [(box.offsets[dim], box.offsets[dim] + box.sizes[dim]) for dim in cut]
        for corner, sign in zip(product(*ends), signs, strict=True):
            count = left.get(corner, 0) + sign
            if count:
                left[corner] = count
            else:
                del left[corner]
    return not left


def _sums_agree(boxes: Sequence[Box], shape: Shape, cut: Sequence[int]) -> bool:
    draw = random.SystemRandom()  # a file must not be able to foresee the numbers
    drawn: dict[tuple[int, int], int] = {}

    def at(dim: int, index: int) -> int:
        known = drawn.get((dim, index))
        if known is None:
            known = drawn[dim, index] = draw.randrange(_PRIME)
        return known

    def value(box: Box) -> int:
        found = 1
        for dim in cut:
            start = box.offsets[dim]
            found = found * (at(dim, start) - at(dim, start + box.sizes[dim])) % _PRIME
        return found

    return (sum(map(value, boxes)) - value(whole(shape))) % _PRIME == 0


def overlapping(boxes: Sequence[Box]) -> tuple[Box, Box] | None:
    """Two boxes that share an element, or None where a search of a fraction of a second finds none.

    It finds two that begin at the same place, any two of parts that are cut along one dimension,
    and any two of some hundreds of parts.
    """
    places: dict[Shape, Box] = {}
    for box in boxes:
        known = places.setdefault(box.offsets, box)
        if known is not box:
            return known, box
    for dim in range(len(boxes[0].shape) if boxes else 0):
        pair = _swept(boxes, dim)
        if pair is not None:
            return pair
    return None


def _swept(boxes: Sequence[Box], dim: int) -> tuple[Box, Box] | None:
    """Two boxes that share an element, among those that are met at one place along `dim`."""
    met: list[tuple[int, int]] = []  # (where the box ends, its number)
    budget = _MAX_PAIRS
    for number in sorted(range(len(boxes)), key=lambda number: boxes[number].offsets[dim]):
        box = boxes[number]
        while met and met[0][0] <= box.offsets[dim]:
            heapq.heappop(met)
        budget -= len(met)
        if budget < 0:
            return None
        for _, other in met:
            if boxes[other].intersect(box) is not None:
                return boxes[other], box
        heapq.heappush(met, (box.offsets[dim] + box.sizes[dim], number))
    return None


def _check_fragment(spec: TensorSpec, fragment: Fragment, over: Shape) -> None:
    box = fragment.box
    inside = box.shape == over and all(
        offset >= 0 and size >= 0 and offset + size <= limit
        for offset, size, limit in zip(box.offsets, box.sizes, box.shape, strict=True)
    )
    if not inside:
        raise FormatError(
            f"a part, {_describe(box)}, does not lie inside shape {over}.",
            path=next((extent.file.path for extent in stored([fragment])), None),
            tensor=spec.name,
        )
    needed = span(box.sizes, fragment.strides) * fragment.dtype.itemsize
    if fragment.extent.nbytes != needed:
        raise FormatError(
            f"a part, {_describe(box)}, takes {needed} bytes and has {fragment.extent.nbytes}.",
            path=next((extent.file.path for extent in stored([fragment])), None),
            tensor=spec.name,
        )


def _describe(box: Box) -> str:
    ranges = (f"{o}:{o + s}" for o, s in zip(box.offsets, box.sizes, strict=True))
    return f"[{', '.join(ranges)}]"
