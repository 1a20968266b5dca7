"""The cast table: each floating type to each other, bit for bit as `torch.Tensor.to` rounds."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import reshard
from reshard.core import dtypes
from reshard.core.arithmetic import LowRank, computed
from reshard.core.dtypes import DType
from reshard.core.tensors import Entry, Extent, FileRef, Fragment, TensorSpec, whole
from tests.tensors import evaluate, raw

Array = np.ndarray[Any, Any]

CAST = [dtypes.parse(name) for name in ("float64", "float32", "float16", "bfloat16")]
FLOAT8 = [dtype for dtype in dtypes.ALL if dtype.floating and dtype.itemsize == 1]
PAIRS = [pytest.param(a, b, id=f"{a}-{b}") for a, b in itertools.product(CAST, CAST) if a != b]
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def torch_type(dtype: DType) -> torch.dtype:
    found = getattr(torch, dtype.name)
    assert isinstance(found, torch.dtype)
    return found


def stored(path: Path, tensor: torch.Tensor, dtype: DType, name: str = "w") -> Entry:
    """The tensor's bytes in a file of their own."""
    path.write_bytes(raw(tensor))
    spec = TensorSpec(name, dtype, tuple(tensor.shape))
    extent = Extent(FileRef(str(path)), 0, spec.nbytes)
    return Entry(spec, (Fragment(whole(spec.shape), extent, dtype),))


def cast(source: Entry, target: DType) -> Array:
    """What the engine makes of a tensor."""
    return evaluate(source, source.spec.numel, target.numpy, buffer=1 << 20).reshape(-1)


def every_pattern(dtype: torch.dtype) -> torch.Tensor:
    """Every value of a 16-bit type: denormals, zeros of both signs, infinities and NaNs too."""
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)


def wide_range(dtype: torch.dtype) -> torch.Tensor:
    """Random values over all the exponents of a type."""
    torch.manual_seed(0)
    nbytes = dtype.itemsize
    bits = torch.randint(-(1 << 63), (1 << 63) - 1, (40_000,), dtype=torch.int64)
    return (bits >> (64 - 8 * nbytes)).to(BITS[nbytes]).view(dtype)


def around(source: torch.dtype, target: torch.dtype) -> torch.Tensor:
    """Values of `source` at, halfway between and next to neighbouring values of `target`."""
    grid = every_pattern(target) if target.itemsize == 2 else wide_range(target)
    grid = torch.sort(grid[torch.isfinite(grid)].to(torch.float64)).values
    middles = (grid[1:] + grid[:-1]) / 2
    exact = torch.cat([grid, middles]).to(source)
    up = torch.nextafter(exact.to(torch.float64), torch.tensor(np.inf, dtype=torch.float64))
    step = torch.finfo(source).eps
    return torch.cat([exact, up.to(source), exact * (1 + step), exact * (1 - step)])


def samples(source: torch.dtype, target: torch.dtype) -> torch.Tensor:
    info = torch.finfo(source)
    special = [0.0, -0.0, 1.0, np.inf, -np.inf, np.nan, info.max, info.min, info.tiny, info.eps]
    own = every_pattern(source) if source.itemsize == 2 else wide_range(source)
    return torch.cat([torch.tensor(special, dtype=source), own, around(source, target)])


def without_overflow(values: torch.Tensor, target: torch.dtype) -> torch.Tensor:
    """The values that do not become infinite on the way."""
    return values[~(torch.isinf(values.to(target)) & torch.isfinite(values))]


def rounded_once(values: torch.Tensor) -> torch.Tensor:
    """The float64 values that torch does not round twice on the way to float16.

    torch goes by way of float32. Where that step is inexact and lands halfway between two float16
    values, the second rounding may go the other way; reshard rounds once.
    """
    over = values.to(torch.float32)
    exponent = torch.frexp(over).exponent.clamp(min=-13)
    halves = over.to(torch.float64) * torch.pow(2.0, 12 - exponent.to(torch.float64))
    halfway = (halves == halves.round()) & (halves % 2 == 1)
    return values[(over.to(torch.float64) == values) | ~halfway]


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_numbers_are_rounded_as_torch_rounds_them(
    source: DType, target: DType, tmp_path: Path
) -> None:
    values = samples(torch_type(source), torch_type(target))
    values = without_overflow(values[~torch.isnan(values)], torch_type(target))
    if (source.name, target.name) == ("float64", "float16"):
        values = rounded_once(values)
    assert len(values) > 60_000
    found = cast(stored(tmp_path / "w", values, source), target)
    expected = values.to(torch_type(target))
    mine = torch.frombuffer(bytearray(found.tobytes()), dtype=BITS[target.itemsize])
    wrong = mine != expected.view(BITS[target.itemsize])
    assert not wrong.any(), (values[wrong][:5], found[wrong.numpy()][:5], expected[wrong][:5])


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_nan_stays_nan(source: DType, target: DType, tmp_path: Path) -> None:
    """Its payload may differ from torch's: ml_dtypes gives one NaN of each sign."""
    values = samples(torch_type(source), torch_type(target))
    values = values[torch.isnan(values)]
    assert len(values) > 1
    found = cast(stored(tmp_path / "w", values, source), target)
    with np.errstate(invalid="ignore"):  # a signalling NaN
        assert np.isnan(found).all()


def test_float64_to_float16_is_rounded_once(tmp_path: Path) -> None:
    """The known difference: torch goes by way of float32 and rounds twice."""
    value = 1 + 2**-11 + 2**-40  # just above halfway between 1 and the next float16
    tensor = torch.tensor([value], dtype=torch.float64)
    found = cast(stored(tmp_path / "w", tensor, dtypes.parse("float64")), dtypes.FLOAT16)
    assert float(found[0]) == 1 + 2**-10
    assert float(tensor.to(torch.float16)[0]) == 1


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_float8_passes_through(dtype: DType, tmp_path: Path) -> None:
    tensor = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch_type(dtype))
    save_file({"w": tensor}, tmp_path / "model.safetensors")
    reshard.convert(tmp_path / "model.safetensors", tmp_path / "out", dtype="bfloat16")
    found = load_file(tmp_path / "out" / "model.safetensors")["w"]
    assert found.dtype == tensor.dtype
    assert raw(found) == raw(tensor)


# By target: the smallest number that rounds to infinity, and the types that hold it.
OVERFLOWS = [
    pytest.param(dtypes.parse(source), dtypes.parse(target), value, id=f"{source}-{target}")
    for target, value, sources in (
        ("float16", 65_520.0, ("float64", "float32")),
        ("float16", 65_536.0, ("bfloat16",)),
        ("bfloat16", (2 - 2**-8) * 2.0**127, ("float64", "float32")),
        ("float32", (2 - 2**-24) * 2.0**127, ("float64",)),
    )
    for source in sources
]


@pytest.mark.parametrize(("source", "target", "value"), OVERFLOWS)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_value_beyond_the_range_is_an_error(
    source: DType, target: DType, value: float, sign: int, tmp_path: Path
) -> None:
    tensor = torch.zeros(1000, dtype=torch_type(source))
    tensor[777] = sign * value * (1 - max(torch.finfo(tensor.dtype).eps, 2**-23))
    entry = stored(tmp_path / "w", tensor, source, "layers.0.weight")
    assert np.isfinite(cast(entry, target)).all()
    tensor[777] = sign * value
    entry = stored(tmp_path / "w", tensor, source, "layers.0.weight")
    with pytest.raises(reshard.VerificationError, match=rf"the largest {target} is") as caught:
        cast(entry, target)
    assert caught.value.tensor == "layers.0.weight"
    assert caught.value.hint


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_infinities_and_nan_are_no_overflow(source: DType, target: DType, tmp_path: Path) -> None:
    tensor = torch.tensor([np.inf, -np.inf, np.nan, 1.0], dtype=torch_type(source))
    found = cast(stored(tmp_path / "w", tensor, source), target).astype(np.float64)
    assert [*found[:2], found[3]] == [np.inf, -np.inf, 1.0]
    assert np.isnan(found[2])


def test_a_merged_update_beyond_the_range_is_an_error(tmp_path: Path) -> None:
    def matrix(name: str, value: float, shape: tuple[int, int]) -> Entry:
        return stored(tmp_path / name, torch.full(shape, value), dtypes.FLOAT32, name)

    weight = matrix("w", 60_000.0, (4, 4))
    low_rank = LowRank(weight, matrix("b", 100.0, (4, 2)), matrix("a", 100.0, (2, 4)), 1.0)
    update = computed(low_rank, weight)
    assert np.isfinite(cast(update, dtypes.FLOAT32)).all()
    with pytest.raises(
        reshard.VerificationError, match="it holds 80000, and the largest float16"
    ) as caught:
        cast(update, dtypes.FLOAT16)
    assert caught.value.tensor == "w"


def test_a_conversion_that_overflows_leaves_nothing(tmp_path: Path) -> None:
    weights = {"a": torch.zeros(3), "norm.weight": torch.tensor([1.0, 70_000.0])}
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(
        reshard.VerificationError, match="it holds 70000, and the largest float16 is 65504"
    ) as caught:
        reshard.convert(tmp_path / "model.safetensors", tmp_path / "out", dtype="float16")
    assert caught.value.tensor == "norm.weight"
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_base_beyond_the_range_does_not_stop_a_conversion(tmp_path: Path) -> None:
    """Only what is written counts; the base is merely compared with."""
    for name, value in (("base", 70_000.0), ("trained", 7.0)):
        (tmp_path / name).mkdir()
        save_file({"w": torch.tensor([value])}, tmp_path / name / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text('{"model_type": "x"}', encoding="utf-8")
    report = reshard.convert(
        tmp_path / "trained", tmp_path / "out", base=tmp_path / "base", dtype="float16"
    )
    assert (report.compared, report.changed) == (1, 1)
