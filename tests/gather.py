"""Read an entry the slow, obvious way: element by element, by the definition of box and strides.

The tests compare the engine and the rearrangements with this; it shares no code with them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from reshard.tensors import Entry, contiguous_strides


def gather(entry: Entry, files: Mapping[str, bytes]) -> np.ndarray[Any, Any]:
    """The entry's elements as an array of its shape, taken one by one from `files`."""
    out = np.zeros(entry.spec.shape, entry.spec.dtype.numpy)
    seen = np.zeros(entry.spec.shape, np.int64)
    flat_out, flat_seen = out.reshape(-1), seen.reshape(-1)
    for fragment in entry.fragments:
        box = fragment.box
        strides = fragment.strides or contiguous_strides(box.sizes)
        for index in itertools.product(*(range(size) for size in box.sizes)):
            at = fragment.extent.offset + fragment.dtype.itemsize * sum(
                i * s for i, s in zip(index, strides, strict=True)
            )
            data = files[fragment.extent.file.path][at : at + fragment.dtype.itemsize]
            value = np.frombuffer(data, fragment.dtype.numpy)[0]
            place = sum(
                (i + o) * s
                for i, o, s in zip(index, box.offsets, contiguous_strides(box.shape), strict=True)
            )
            flat_out[place] = value
            flat_seen[place] += 1
    if out.size:
        np.testing.assert_array_equal(seen, 1)
    return out
