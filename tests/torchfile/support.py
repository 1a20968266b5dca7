"""Writing files with the real torch, and comparing what reshard reads with what was saved."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from reshard.containers.torch import TensorRef, TorchFile, read
from reshard.core.dtypes import DType
from reshard.storage.local import Sources
from reshard.storage.source import Source

OLD = {"_use_new_zipfile_serialization": False}


def saved(value: object, *, old: bool = False, protocol: int = 2) -> bytes:
    """The bytes that torch.save writes."""
    stream = io.BytesIO()
    torch.save(value, stream, pickle_protocol=protocol, **(OLD if old else {}))
    return stream.getvalue()


@contextmanager
def opened(path: Path, content: bytes) -> Iterator[Source]:
    """`content` as an opened file."""
    path.write_bytes(content)
    with Sources() as sources:
        yield sources.open(path)


def read_bytes(path: Path, content: bytes) -> TorchFile:
    """What reshard reads of a file that holds `content`."""
    with opened(path, content) as source:
        return read(source)


def value_of(path: Path, content: bytes) -> Any:
    """The value of a file that holds `content`."""
    return read_bytes(path, content).value


def tensor(ref: TensorRef, content: bytes) -> torch.Tensor:
    """The tensor that `ref` says lies in `content`."""
    dtype: torch.dtype = getattr(torch, ref.dtype.name)
    extent = ref.extent
    raw = bytearray(content[extent.offset : extent.offset + extent.nbytes])
    if not raw:
        return torch.empty(ref.shape, dtype=dtype)
    elements = torch.frombuffer(raw, dtype=torch.uint8).view(dtype)
    if ref.strides is None:
        return elements.reshape(ref.shape)
    return elements.as_strided(ref.shape, ref.strides)


def same(have: object, want: Any, content: bytes) -> bool:
    """Whether a value that reshard read equals the value that torch loads, bit for bit."""
    if isinstance(want, torch.Tensor):
        return isinstance(have, TensorRef) and same_tensor(tensor(have, content), want)
    if isinstance(want, torch.dtype):
        return isinstance(have, DType) and f"torch.{have}" == str(want)
    if isinstance(want, dict):
        return (
            type(have) is dict
            and list(have) == list(want)
            and all(same(have[key], want[key], content) for key in want)
        )
    if isinstance(want, list | tuple):
        kind = list if isinstance(want, list) else tuple
        return (
            type(have) is kind
            and len(have) == len(want)
            and all(same(a, b, content) for a, b in zip(have, want, strict=True))
        )
    # repr tells nan from nan, -0.0 from 0.0 and True from 1 as equality does not.
    return type(have) is type(want) and repr(have) == repr(want)


def same_tensor(have: torch.Tensor, want: torch.Tensor) -> bool:
    """Equal dtype, shape and bytes."""
    want = want.detach()
    return (
        have.dtype == want.dtype and have.shape == want.shape and raw_bytes(have) == raw_bytes(want)
    )


def raw_bytes(value: torch.Tensor) -> bytes:
    """The elements of `value`, row-major."""
    if not value.numel():
        return b""
    # A dimension of one element may keep any stride, which view() does not like.
    plain = value.contiguous().as_strided((value.numel(),), (1,))
    if plain.dtype != torch.uint8:
        plain = plain.view(torch.uint8)
    return bytes(plain.numpy())
