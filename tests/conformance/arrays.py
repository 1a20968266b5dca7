"""Arrays to torch tensors and back, bit for bit; bfloat16 is a type of ml_dtypes in numpy."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import torch

from reshard.testing.truth import Array


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
