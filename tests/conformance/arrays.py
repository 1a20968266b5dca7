"""Arrays to torch tensors and back, bit for bit; bfloat16 is a type of ml_dtypes in numpy.

And what torch's DCP loads.
"""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from reshard.testing.truth import Array, Tensors


def to_torch(array: Array) -> torch.Tensor:
    """A tensor of its own memory with the array's dtype, shape and bits."""
    array = array.copy()
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_numpy(tensor: torch.Tensor) -> Array:
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        bits: Array = tensor.view(torch.int16).numpy()
        return bits.view(ml_dtypes.bfloat16)
    found: Array = tensor.numpy()
    return found


def loaded_by_dcp(folder: Path) -> Tensors:
    """Every tensor of a DCP folder, as torch's own loader gives it."""
    metadata = dcp.FileSystemReader(folder).read_metadata()
    state = {}
    for name, stored in metadata.state_dict_metadata.items():
        assert isinstance(stored, TensorStorageMetadata)
        state[name] = torch.empty(stored.size, dtype=stored.properties.dtype)
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    return {name: to_numpy(tensor) for name, tensor in state.items()}
