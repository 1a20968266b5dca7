"""Looking at every weight once, in blocks, without loading a model.

A block is at most `BLOCK_NBYTES` of one tensor's rows, so the memory held does not depend on the
model's size (the files are mapped by safetensors: the kernel may drop what was read).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from reshard.errors import FormatError, IncompleteError

BLOCK_NBYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """What one pass over a tensor tells. `low` and `high` are None where it has no numbers to
    order (empty, not finite, or a type without order)."""

    name: str
    shape: tuple[int, ...]
    nan: int
    infinite: int
    low: float | None
    high: float | None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def constant(self) -> bool:
        """Whether it has several elements and all are the same."""
        return self.numel > 1 and self.low is not None and self.low == self.high


class WeightFiles:
    """The tensors of a folder's safetensors files, by name; a context manager.

    Raises `FormatError` if a file is not safetensors or is cut short, `IncompleteError` if two
    files hold the same tensor.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._stack = ExitStack()
        self._where: dict[str, Any] = {}
        for path in files:
            try:
                opened = self._stack.enter_context(safe_open(path, framework="pt"))
            except SafetensorError as error:
                self._stack.close()
                raise FormatError(
                    f"the file is not a whole safetensors file: {error}.",
                    path=path,
                    hint="Copy it again, or convert again.",
                ) from error
            self._add(path, opened)

    def _add(self, path: Path, opened: Any) -> None:
        for name in opened.keys():  # noqa: SIM118 - safe_open is not a mapping
            if name in self._where:
                self._stack.close()
                raise IncompleteError("two files hold this tensor.", path=path, tensor=name)
            self._where[name] = opened

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def names(self) -> tuple[str, ...]:
        """Every tensor's name, sorted."""
        return tuple(sorted(self._where))

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._where[name].get_slice(name).get_shape())

    def blocks(self, name: str, rows: int | None = None) -> Iterator[torch.Tensor]:
        """The tensor in blocks of whole rows; a scalar or an empty tensor is one block.

        `rows` overrides how many rows a block has, so that two tensors can be walked together.
        """
        shape = self.shape(name)
        if not shape or not math.prod(shape):
            yield self._where[name].get_tensor(name)
            return
        part = self._where[name].get_slice(name)
        step = rows or rows_per_block(shape)
        for start in range(0, shape[0], step):
            yield part[start : start + step]


def rows_per_block(shape: Sequence[int]) -> int:
    """How many rows of up to 8 bytes an element fit into a block; at least one."""
    return max(1, BLOCK_NBYTES // (8 * max(1, math.prod(shape[1:]))))


def scan(
    weights: WeightFiles, on_tensor: Callable[[int, int], None] | None = None
) -> Iterator[TensorFacts]:
    """Look at every tensor; `on_tensor` hears how many of how many are done."""
    names = weights.names()
    for done, name in enumerate(names, start=1):
        yield facts(name, weights.shape(name), weights.blocks(name))
        if on_tensor is not None:
            on_tensor(done, len(names))


def facts(name: str, shape: tuple[int, ...], blocks: Iterator[torch.Tensor]) -> TensorFacts:
    """What the blocks of one tensor tell."""
    nan = infinite = 0
    low, high = math.inf, -math.inf
    for block in blocks:
        if not block.numel() or block.is_complex():
            continue
        # Types of 8 bits have no ordering in torch; they widen without loss.
        values = block.float() if block.is_floating_point() and block.itemsize == 1 else block
        least, most = torch.aminmax(values)
        low, high = min(low, float(least)), max(high, float(most))
        # aminmax passes NaN on and shows infinities: one pass tells that a block is sound.
        if not math.isfinite(float(least)) or not math.isfinite(float(most)):
            nan += int(values.isnan().sum())
            infinite += int(values.isinf().sum())
    ordered = not nan and not infinite and low <= high
    return TensorFacts(
        name, shape, nan, infinite, low if ordered else None, high if ordered else None
    )
