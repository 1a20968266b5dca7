"""The layout of a state dict's archive, filled in and loaded by torch."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib

import torch

from reshard.containers.torch.write import ALIGNMENT, TensorBytes, lay_out, lay_out_state_dict
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


def test_data_with_tensors_in_it() -> None:
    step = TensorBytes(dtypes.FLOAT32, (), struct.pack("<f", 3.0))
    spec = TensorSpec("w", dtypes.FLOAT32, (2, 2))
    groups = [{"lr": 0.1, "betas": (0.9, 0.95), "fused": None, "params": [0, 1], "on": True}]
    value = {"param_groups": groups, "state": {0: {"step": step}, 1: {"step": step}}, "w": spec}
    layout = lay_out(value)
    content = bytearray(layout.nbytes)
    for offset, literal in layout.literals:
        content[offset : offset + len(literal)] = literal
    ((start, crc_offsets),) = layout.places
    data = struct.pack("<4f", 1, 2, 3, 4)
    content[start : start + 16] = data
    for offset in crc_offsets:
        struct.pack_into("<L", content, offset, zlib.crc32(data))
    assert zipfile.ZipFile(io.BytesIO(content)).testzip() is None
    loaded = torch.load(io.BytesIO(content), weights_only=True)
    assert loaded["param_groups"] == groups
    assert [loaded["state"][at]["step"] for at in (0, 1)] == [torch.tensor(3.0)] * 2
    assert loaded["state"][0]["step"].data_ptr() != loaded["state"][1]["step"].data_ptr()
    assert torch.equal(loaded["w"], torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
