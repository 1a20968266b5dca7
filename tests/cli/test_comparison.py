"""What `reshard diff` shows: the summary first, layers folded, in natural order."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from reshard.cli.app import reshard as command
from reshard.cli.app import run

Shown = pytest.CaptureFixture[str]
LAYERS = 12


def checkpoint(
    folder: Path, step: float, **more: np.ndarray[tuple[int], np.dtype[np.float32]]
) -> str:
    """A model of a few layers, half of whose projections' elements are moved by `step`."""
    moved = np.array([step, 0, step * 2, 0], np.float32)
    tensors = {f"model.layers.{n}.up.weight": moved * (n + 1) for n in range(LAYERS)}
    tensors |= {"model.norm.weight": np.ones(4, np.float32), "head.weight": moved, **more}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return str(folder)


def test_layers_are_folded_and_the_summary_comes_first(tmp_path: Path, capsys: Shown) -> None:
    a, b = checkpoint(tmp_path / "a", 1), checkpoint(tmp_path / "b", 0)
    assert run(command, ["diff", a, b]) == 1
    lines = capsys.readouterr().out.splitlines()
    share = "50.0 % of the elements of these 13, by 24 at most"
    assert lines[0] == f"1 tensors are equal, 13 differ: {share}."
    assert lines[1].split() == ["tensor", "tensors", "differ", "largest", "mean"]
    rows = [line.split() for line in lines[2:]]
    assert rows == [
        ["head.weight", "1", "50.0", "%", "2", "1.5"],
        ["model.layers.*.up.weight", "12", "50.0", "%", "24", "9.75"],
    ]


def test_every_tensor_in_natural_order(tmp_path: Path, capsys: Shown) -> None:
    a, b = checkpoint(tmp_path / "a", 1), checkpoint(tmp_path / "b", 0)
    assert run(command, ["diff", a, b, "--tensors"]) == 1
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]]
    expected = ["head.weight", *(f"model.layers.{n}.up.weight" for n in range(LAYERS))]
    assert names == expected
    assert run(command, ["diff", a, b, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)["differences"]
    assert [one["name"] for one in found] == expected


def test_what_is_on_one_side_only_is_not_mixed_with_values(tmp_path: Path, capsys: Shown) -> None:
    extra = {f"model.layers.{n}.bias": np.ones(2, np.float32) for n in range(3)}
    a, b = checkpoint(tmp_path / "a", 1, **extra), checkpoint(tmp_path / "b", 0)
    assert run(command, ["diff", a, b]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1 tensors are equal, 16 differ, 13 of them in values alone."
    (row,) = [line for line in lines if line.startswith("model.layers.*.bias")]
    assert row.split()[1:5] == ["3", "only", "in", "the"]


def test_equal_checkpoints(tmp_path: Path, capsys: Shown) -> None:
    a, b = checkpoint(tmp_path / "a", 1), checkpoint(tmp_path / "b", 1)
    assert run(command, ["diff", a, b]) == 0
    assert capsys.readouterr().out == "14 tensors are equal, 0 differ.\n"
