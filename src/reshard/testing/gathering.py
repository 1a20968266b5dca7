"""Read an entry in the slow, obvious way: element by element, by the definition of box and strides.

What the engine and the rearrangements do is compared with this; it shares no code with them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from reshard.core.strides import contiguous_strides
from reshard.core.tensors import Entry


def gather(entry: Entry, files: Mapping[str, bytes]) -> np.ndarray[Any, Any]:
    """The entry's elements as an array of its shape, taken one by one from `files`.

    Its fragments must be stored in its own dtype.
    """
    numel, itemsize = entry.spec.numel, entry.spec.dtype.itemsize
    # As bytes: a signalling NaN that is taken as a number becomes another NaN.
    out = np.zeros(numel, f"V{itemsize}")
    seen = np.zeros(numel, np.int64)
    for fragment in entry.fragments:
        box = fragment.box
        strides = fragment.strides or contiguous_strides(box.sizes)
        for index in itertools.product(*(range(size) for size in box.sizes)):
            at = fragment.extent.offset + itemsize * sum(
                i * s for i, s in zip(index, strides, strict=True)
            )
            data = files[fragment.in_file.file.path][at : at + itemsize]
            place = sum(
                (i + o) * s
                for i, o, s in zip(index, box.offsets, contiguous_strides(box.shape), strict=True)
            )
            out[place] = np.frombuffer(data, out.dtype)[0]
            seen[place] += 1
    if numel:
        np.testing.assert_array_equal(seen, 1)
    return out.view(entry.spec.dtype.numpy).reshape(entry.spec.shape)
