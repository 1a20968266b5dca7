"""Memory is a budget: the same for a model four times as large."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import many
from tests import zero3
from tests.budget import MIB, needs_proc, peak, run

pytestmark = pytest.mark.heavy

BUDGET = 200 * MIB
# Peaks of two equal runs differ by the pages that the allocator happens to keep.
SLACK = 20 * MIB

CODE = """
import reshard
reshard.convert(sys.argv[1], sys.argv[2], to=sys.argv[3], dtype=sys.argv[4], threads=4)
assert "torch" not in sys.modules
"""


def save_zero3(folder: Path, nbytes: int) -> None:
    """fp32 masters of `nbytes` over two ranks, and Adam's moments, twice as much again."""
    zero3.save(folder, layers(nbytes), world=2)


def save_safetensors(folder: Path, nbytes: int) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in layers(nbytes * 2).items()}
    save_file(tensors, folder / "model.safetensors")


def layers(nbytes: int) -> dict[str, torch.Tensor]:
    """One matrix of a quarter of everything, many of 4 MiB, and a vector beside each of these."""
    values = torch.arange(MIB, dtype=torch.float32)
    tensors = {"embed.weight": values.repeat(nbytes // 4 // (4 * MIB)).reshape(-1, 1024)}
    for number in range(nbytes * 3 // 4 // (4 * MIB)):
        tensors[f"layers.{number}.weight"] = (values + number).reshape(1024, 1024)
        tensors[f"layers.{number}.norm"] = torch.full((1025,), float(number))
    return tensors


@needs_proc
@pytest.mark.parametrize(
    ("save", "to", "dtype"),
    [
        pytest.param(save_zero3, "hf", "bfloat16", id="zero3-hf"),
        pytest.param(save_safetensors, "dcp", "keep", id="safetensors-dcp"),
    ],
)
def test_memory_does_not_grow_with_the_model(
    tmp_path: Path, save: Callable[[Path, int], None], to: str, dtype: str
) -> None:
    peaks = []
    for nbytes in (100 * MIB, 400 * MIB):
        folder = tmp_path / str(nbytes // MIB)
        folder.mkdir()
        save(folder, nbytes)
        peaks.append(peak(CODE, folder, tmp_path / f"out-{nbytes // MIB}", to, dtype))
        for path in (*folder.iterdir(), *(tmp_path / f"out-{nbytes // MIB}").iterdir()):
            path.unlink()
    assert max(peaks) < BUDGET, [size // MIB for size in peaks]
    assert abs(peaks[1] - peaks[0]) < SLACK, [size // MIB for size in peaks]


@needs_proc
@pytest.mark.parametrize(
    ("source", "to", "most"), [("hf", "hf", 1500), ("hf", "dcp", 1600), ("dcp", "hf", 1600)]
)
def test_a_tensor_takes_few_bytes_beside_its_values(
    tmp_path: Path, source: str, to: str, most: int
) -> None:
    """Names, shapes, places and digests: 200,000 small tensors must convert on a small machine.

    Counted from 2,000 on, where less was allocated at once than later, so more than of 200,000.
    """
    counts, peaks = (2_000, 14_000), []
    for count in counts:
        many.MAKERS[source](tmp_path / str(count), count)
        peaks.append(peak(CODE, tmp_path / str(count), tmp_path / f"out-{count}", to, "keep"))
    each = (peaks[1] - peaks[0]) / (counts[1] - counts[0])
    assert each < most, [size // MIB for size in peaks]


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize(("source", "to"), [("hf", "hf"), ("hf", "dcp"), ("dcp", "hf")])
def test_two_hundred_thousand_tensors_convert_under_256_mib(
    tmp_path: Path, source: str, to: str
) -> None:
    many.MAKERS[source](tmp_path / "model", 200_000)
    folders = (tmp_path / "model", tmp_path / "out")
    options = ("--to", to, "--dtype", "keep", "--threads", "4", "--quiet")
    _, took, said = run("convert", *folders, *options, seconds=900)
    assert (tmp_path / "out").is_dir(), said
    assert took < 256 * MIB, took // MIB
