"""Cut the output into pieces: each is made, hashed and verified separately.

A piece is a leaf of one tensor's digest (`core.digests`): 64 MiB of its row-major bytes, or all of
a smaller tensor. It lies in one file, or where a layout cuts tensors (DCP) in the chunks that the
leaf meets, one after another. Within a piece bytes are made in small runs, in ascending order.
"""

from __future__ import annotations

from collections.abc import Iterator

from msgspec import Struct

from reshard.core.digests import leaf_numel
from reshard.core.fragments import computed
from reshard.core.plan import Slot
from reshard.core.rearrange import boxes_of_range
from reshard.core.strides import blocks
from reshard.core.tensors import Box


class Run(Struct, frozen=True):
    """`numel` elements of a slot, from flat element `start` on.

    They are those of `box` after its first `skip`.
    """

    box: Box
    start: int
    skip: int
    numel: int


def runs(slot: Slot, before: int, max_numel: int) -> Iterator[tuple[int, Run]]:
    """A slot as runs of at most `max_numel` elements, each with the leaf that it belongs to.

    `before` is the number of the tensor's elements in slots before this one. Where a leaf begins
    within a block, what is stored is read from there; what is computed is computed as the whole
    block, twice: how a product is summed, and so its last bit, may depend on the block.
    """
    shape, leaf = slot.spec.shape, leaf_numel(slot.spec.dtype)
    whole_blocks = computed(slot.source)
    start = 0
    for block in blocks(shape, max_numel):
        end = start + block.numel
        at = start
        while at < end:
            index = (before + at) // leaf
            stop = min(end, (index + 1) * leaf - before)
            if (at, stop) == (start, end) or whole_blocks:
                yield index, Run(block, at, at - start, stop - at)
            else:
                done = at
                for box in boxes_of_range(shape, at, stop):
                    yield index, Run(box, done, 0, box.numel)
                    done += box.numel
            at = stop
        start = end
