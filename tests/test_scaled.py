"""Codes times their scales, block by block, against numpy and torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from reshard.core import dtypes, rearrange
from reshard.core.arithmetic import LowRank, computed
from reshard.core.dtypes import BFLOAT16, DType
from reshard.core.scaled import Code, Scaled
from reshard.core.tensors import (
    Box,
    Entry,
    Shape,
    TensorSpec,
)
from tests import tensors
from tests.tensors import stored

Array = np.ndarray[Any, Any]
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def evaluate(entry: Entry, limit: int, dtype: DType = dtypes.FLOAT32) -> Array:
    return tensors.evaluate(entry, limit, dtype.numpy, buffer=1 << 12)


def expanded(scales: Array, block: Shape, shape: Shape) -> Array:
    for dim, (size, length) in enumerate(zip(block, shape, strict=True)):
        scales = np.repeat(scales, size, axis=dim).take(range(length), axis=dim)
    return scales


def made(
    folder: Path, code: Code, shape: Shape, block: Shape, scale: str = "float32"
) -> tuple[Entry, Array]:
    """A quantised tensor and the float32 numbers that it stands for."""
    random = np.random.default_rng(7)
    packed = code == "float4_e2m1"
    codes = random.integers(0, 256, (*shape[:-1], shape[-1] // (2 if packed else 1)), np.uint8)
    if packed:
        numbers = E2M1[np.stack([codes & 15, codes >> 4], -1).reshape(shape)]
    else:
        numbers = codes.view(getattr(ml_dtypes, code)).astype(np.float32)
    grid = tuple(-(-n // b) for n, b in zip(shape, block, strict=True))
    scales = np.exp2(random.integers(-9, 9, grid)).astype(np.float32)
    if scale != "float8_e8m0fnu":
        scales *= random.uniform(1, 2, grid).astype(np.float32)
    scales = scales.astype(dtypes.parse(scale).numpy)
    entry = Scaled(stored(folder, "codes", codes), stored(folder, "scales", scales), block, code)
    like = Entry(TensorSpec("w", BFLOAT16, shape), ())
    return computed(entry, like), numbers * expanded(scales.astype(np.float32), block, shape)


def same(found: Array, expected: Array) -> None:
    np.testing.assert_array_equal(found.astype(np.float32), expected.astype(np.float32))


CASES: dict[str, tuple[Code, Shape, Shape, str]] = {
    "blocks": ("float8_e4m3fn", (256, 384), (128, 128), "float32"),
    "edges that are not whole blocks": ("float8_e4m3fn", (200, 333), (128, 128), "float32"),
    "smaller than a block": ("float8_e4m3fn", (3, 5), (128, 128), "float32"),
    "bfloat16 scales": ("float8_e4m3fn", (130, 70), (64, 32), "bfloat16"),
    "E8M0 scales": ("float8_e4m3fn", (64, 96), (1, 32), "float8_e8m0fnu"),
    "a scale for each row": ("float8_e4m3fn", (33, 17), (1, 17), "float32"),
    "one scale": ("float8_e5m2", (33, 17), (33, 17), "float32"),
    "a scale for each column": ("float8_e4m3fn", (2, 9, 12), (1, 9, 1), "float16"),
    "stacked": ("float8_e4m3fnuz", (3, 130, 140), (1, 128, 128), "float32"),
    "two codes a byte": ("float4_e2m1", (2, 6, 96), (1, 1, 32), "float8_e8m0fnu"),
}


@pytest.mark.heavy
@pytest.mark.parametrize("limit", [1, 7, 64, 1000, 1 << 20])
@pytest.mark.parametrize("case", CASES)
def test_blocks_of_any_size_give_the_numbers(case: str, limit: int, tmp_path: Path) -> None:
    code, shape, block, scale = CASES[case]
    entry, expected = made(tmp_path, code, shape, block, scale)
    if entry.spec.numel // limit > 3000:
        entry = rearrange.crop(entry, Box(shape, (0,) * len(shape), (1,) * len(shape)))
        expected = expected[(slice(0, 1),) * len(shape)]
    same(evaluate(entry, limit), expected)


def test_the_product_is_rounded_once_as_torch_does(tmp_path: Path) -> None:
    entry, _ = made(tmp_path, "float8_e4m3fn", (200, 333), (128, 128))
    codes = torch.frombuffer(bytearray((tmp_path / "codes").read_bytes()), dtype=torch.uint8)
    scales = torch.frombuffer(bytearray((tmp_path / "scales").read_bytes()), dtype=torch.float32)
    wide = scales.reshape(2, 3).repeat_interleave(128, 0).repeat_interleave(128, 1)[:200, :333]
    product = codes.view(torch.float8_e4m3fn).reshape(200, 333).float() * wide
    found = evaluate(entry, 5000, BFLOAT16)
    np.testing.assert_array_equal(
        found.astype(np.float32), product.bfloat16().float().numpy(), strict=True
    )


def test_a_quantised_tensor_is_turned_and_stacked(tmp_path: Path) -> None:
    entry, expected = made(tmp_path, "float4_e2m1", (2, 6, 96), (1, 1, 32), "float8_e8m0fnu")
    turned = rearrange.transpose(entry, 1, 2)
    same(evaluate(turned, 500), expected.transpose(0, 2, 1))
    same(evaluate(rearrange.select(turned, 1), 55), expected[1].T)
    odd = rearrange.crop(entry, Box((2, 6, 96), (0, 1, 33), (2, 4, 31)))
    same(evaluate(odd, 20), expected[:, 1:5, 33:64])
    same(
        evaluate(rearrange.concat([entry, entry], 1), 300), np.concatenate([expected, expected], 1)
    )


def test_an_update_onto_dequantised_numbers(tmp_path: Path) -> None:
    entry, expected = made(tmp_path, "float8_e4m3fn", (200, 333), (128, 128))
    random = np.random.default_rng(0)
    left, right = (random.standard_normal(s).astype(np.float32) for s in ((200, 4), (4, 333)))
    update = LowRank(entry, stored(tmp_path, "b", left), stored(tmp_path, "a", right), 0.5)
    known = np.isfinite(expected)
    found = evaluate(computed(update, entry), 7000)
    np.testing.assert_allclose(
        found[known], (expected + left @ right * np.float32(0.5))[known], rtol=1e-6, atol=1e-6
    )


def test_a_tensor_is_seen_in_another_shape(tmp_path: Path) -> None:
    array = np.arange(48, dtype=np.float32).reshape(2, 3, 2, 4)
    entry = stored(tmp_path, "w", array)
    same(evaluate(rearrange.reshape(entry, (2, 3, 8)), 5), array.reshape(2, 3, 8))
    torn = rearrange.concat(
        [rearrange.crop(entry, Box((2, 3, 2, 4), (i, 0, 0, 0), (1, 3, 2, 4))) for i in (0, 1)], 0
    )
    same(evaluate(rearrange.reshape(torn, (6, 8)), 5), array.reshape(6, 8))


@pytest.fixture(params=[False, True], ids=["", "flushed"])
def flushed(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether this thread's processor takes subnormal numbers for zero."""
    if not torch.set_flush_denormal(request.param):
        pytest.skip("this processor cannot")
    yield request.param
    torch.set_flush_denormal(False)


@pytest.mark.parametrize(
    "code", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"]
)
def test_every_code_is_its_number(code: Code, flushed: bool, tmp_path: Path) -> None:
    """NaN, infinity and subnormal codes too, whatever a library told the processor."""
    codes = np.arange(256, dtype=np.uint8).reshape(2, 128)
    ones = stored(tmp_path, "scales", np.ones((1, 1), np.float32))
    entry = Scaled(stored(tmp_path, "codes", codes), ones, (2, 128), code)
    like = Entry(TensorSpec("w", BFLOAT16, (2, 128)), ())
    found = evaluate(computed(entry, like), 1 << 20)
    expected = torch.from_numpy(codes).view(getattr(torch, code)).float().numpy()
    np.testing.assert_array_equal(found, expected)
