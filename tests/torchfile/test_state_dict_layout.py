"""The layout of a state dict's archive, filled in and loaded by torch."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib

import torch

from reshard.containers.torch.write import ALIGNMENT, lay_out_state_dict
from reshard.core import dtypes
from reshard.core.tensors import TensorSpec
from tests.tensors import raw


def test_torch_loads_what_was_laid_out() -> None:
    tensors = {
        "a.weight": torch.randn(3, 5),
        "b": torch.tensor(7, dtype=torch.int64),
        "empty": torch.empty(0, 4, dtype=torch.bfloat16),
        "c.ü": torch.randn(17).to(torch.bfloat16),
        "eight": torch.randn(9).to(torch.float8_e4m3fn),
        "flag": torch.tensor([True, False]),
    }
    specs = [
        TensorSpec(name, dtypes.parse(str(value.dtype)), tuple(value.shape))
        for name, value in tensors.items()
    ]
    layout = lay_out_state_dict(specs)
    content = bytearray(layout.nbytes)
    for offset, literal in layout.literals:
        content[offset : offset + len(literal)] = literal
    for value, (start, crc_offsets) in zip(tensors.values(), layout.places, strict=True):
        data = raw(value)
        assert start % ALIGNMENT == 0
        content[start : start + len(data)] = data
        for offset in crc_offsets:
            struct.pack_into("<L", content, offset, zlib.crc32(data))
    assert zipfile.ZipFile(io.BytesIO(content)).testzip() is None
    loaded = torch.load(io.BytesIO(content), weights_only=True)
    assert list(loaded) == list(tensors)
    for name, value in tensors.items():
        assert loaded[name].dtype == value.dtype
        assert loaded[name].shape == value.shape
        assert raw(loaded[name]) == raw(value)
