"""`reshard.open(...)` and `.numpy()`: the same files, and the bytes that they say they hold."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import reshard
from reshard.errors import FormatError, IncompleteError

VALUES = np.arange(4096, dtype=np.float32)


def saved(folder: Path, kind: str) -> Path:
    folder.mkdir(exist_ok=True)
    if kind == "safetensors":
        save_file({"a": VALUES, "b": VALUES + 1}, folder / "model.safetensors")
        return folder / "model.safetensors"
    tensors = {"a": torch.from_numpy(VALUES.copy()), "b": torch.from_numpy(VALUES + 1)}
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
@pytest.mark.parametrize("change", ["rewritten", "another", "touched", "longer", "gone"])
def test_a_file_that_changed_since_it_was_opened(tmp_path: Path, kind: str, change: str) -> None:
    path = saved(tmp_path / "model", kind)
    tensors = reshard.open(tmp_path / "model").tensors
    np.testing.assert_array_equal(tensors["a"].numpy(), VALUES)
    if change == "rewritten":  # a value, in place
        content = bytearray(path.read_bytes())
        content[-100] ^= 1
        path.write_bytes(content)
    elif change == "another":  # a file of the same size and time under the same name
        other = saved(tmp_path / "other", kind)
        os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
        other.replace(path)
    elif change == "touched":
        os.utime(path, ns=(0, 0))
    elif change == "longer":
        with path.open("ab") as file:
            file.write(b"\0")
    else:
        path.unlink()
    with pytest.raises(reshard.ReshardError) as caught:
        tensors["a"].numpy()
    assert caught.value.path == str(path)
    if change != "gone":
        assert isinstance(caught.value, IncompleteError)
        assert "changed after the checkpoint was opened" in str(caught.value)
        assert "Open the checkpoint again" in str(caught.value)


def test_bytes_that_are_not_those_of_the_checksum(tmp_path: Path) -> None:
    path = saved(tmp_path / "model", "torch")
    content = bytearray(path.read_bytes())
    at = content.index((VALUES + 1).tobytes())
    content[at + 5000] ^= 1
    path.write_bytes(content)
    tensors = reshard.open(path).tensors
    np.testing.assert_array_equal(tensors["a"].numpy(), VALUES)
    with pytest.raises(FormatError, match="the file itself says"):
        tensors["b"].numpy()
