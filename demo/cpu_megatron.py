"""megatron-core on the CPU: what it asks of a GPU, answered there; nothing else is changed."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch


class _Stream:
    """A stream, or an event of one, on which nothing waits."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: Any) -> None: ...
    def wait_stream(self, *_: Any) -> None: ...
    def wait_event(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record(self, *_: Any) -> None: ...
    def record_event(self, *_: Any) -> _Stream:
        return self


class _Tracker:
    """Random numbers of the CPU's own generator."""

    @contextlib.contextmanager
    def fork(self, *_: Any, **__: Any) -> Iterator[None]:
        yield

    def is_initialized(self) -> bool:
        return True

    def add(self, *_: Any, **__: Any) -> None: ...


def without_gpu() -> None:
    """Call it once, before a model is built."""
    # Imported first: the modules below take these names from each other.
    import megatron.core.models.gpt  # noqa: F401
    import megatron.core.transformer.moe.moe_utils as routing
    import megatron.core.transformer.multi_latent_attention as latent

    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    for name in ("synchronize", "empty_cache", "manual_seed", "set_device"):
        setattr(cuda, name, lambda *_, **__: None)
    cuda.Stream = cuda.Event = _Stream
    cuda.current_stream = lambda *_: _Stream()
    cuda.stream = lambda *_, **__: _Stream()
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *_, **__: self
    tensor.record_stream = lambda *_, **__: None
    module: Any = torch.nn.Module
    module.cuda = lambda self, *_, **__: self
    tracker = _Tracker()
    for each in list[Any](sys.modules.values()):
        named = getattr(each, "__name__", "")
        if named.startswith("megatron") and hasattr(each, "get_cuda_rng_tracker"):
            each.get_cuda_rng_tracker = lambda *_, **__: tracker
    if not hasattr(routing, "te_general_gemm"):
        routing.te_general_gemm = None
    for name in ("TELinear", "TEColumnParallelLinear", "TELayerNormColumnParallelLinear"):
        # None without TransformerEngine, and asked for by isinstance all the same.
        if hasattr(latent, name) and not isinstance(getattr(latent, name), type):
            setattr(latent, name, type(name, (), {}))
