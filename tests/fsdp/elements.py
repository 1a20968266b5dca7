"""Read an entry the obvious way: each fragment's file whole, its box cut out with numpy.

The tests compare the reader with the truth through this; it shares no code with the engine.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import zstandard

from reshard.core.strides import contiguous_strides
from reshard.core.tensors import Entry, FileRef

_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def elements(entry: Entry) -> bytes:
    """The tensor's row-major bytes."""
    word = _UNSIGNED[entry.spec.dtype.itemsize]
    over = entry.fragments[0].box.shape if entry.fragments else entry.spec.shape
    out = np.zeros(over, word)
    for fragment in entry.fragments:
        extent, box = fragment.in_file, fragment.box
        data = _content(extent.file)[extent.offset : extent.offset + extent.nbytes]
        strides = fragment.strides or contiguous_strides(box.sizes)
        stored = np.lib.stride_tricks.as_strided(
            np.frombuffer(data, word), box.sizes, [s * word().itemsize for s in strides]
        )
        place = tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))
        out[place] = stored
    return out.tobytes()


def _content(file: FileRef) -> bytes:
    data = Path(file.path).read_bytes()
    if file.codec is None:
        return data
    frame = data[file.frame_offset : file.frame_offset + file.frame_nbytes]
    return zstandard.ZstdDecompressor().decompressobj().decompress(frame)
