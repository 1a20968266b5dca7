"""What `reshard diff` shows: the summary first, layers folded, in natural order."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from reshard.cli.app import reshard as command
from reshard.cli.app import run

Shown = pytest.CaptureFixture[str]
LAYERS = 12


def checkpoint(folder: Path, step: float, **more: np.ndarray[Any, np.dtype[np.float32]]) -> str:
    """A model of a few layers, half of whose projections' elements are moved by `step`."""
    moved = np.array([step, 0, step * 2, 0], np.float32)
    tensors = {f"model.layers.{n}.up.weight": moved * (n + 1) for n in range(LAYERS)}
    tensors |= {"model.norm.weight": np.ones(4, np.float32), "head.weight": moved, **more}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return str(folder)


def tables(text: str) -> list[list[list[str]]]:
    """The tables of an output, which blank lines part, as cells."""
    return [
        [re.split(r" {2,}", line.strip()) for line in part.splitlines()]
        for part in text.split("\n\n")
    ]


def test_the_summary_comes_first_then_layers_and_modules(tmp_path: Path, capsys: Shown) -> None:
    a, b = checkpoint(tmp_path / "a", 1), checkpoint(tmp_path / "b", 0)
    assert run(command, ["diff", a, b]) == 1
    summary, layers, modules = tables(capsys.readouterr().out)
    assert summary[0] == ["1 tensors are equal, 13 differ."]
    assert dict(summary[1:]) == {
        "tensors": "13 of 14 differ",
        "parameters": "26 of 56 differ (46.4 %)",
        "bytes": "104 B of 224 B",
        "change": "0.999 of the weights' norm; of a tensor 0.929 on average, 1 at most",
        "largest": "24, in model.layers.11.up.weight",
        "layers": "moved most: head.weight (1), model.layers.0 (1), model.layers.1 (1)",
        "modules": "moved most: head.weight (1), model.layers.*.up.weight (1)",
    }
    assert layers[0] == ["tensors", "elements", "largest", "mean", "change", "layer"]
    assert [row[-1] for row in layers[1:]] == [
        "head.weight", *(f"model.layers.{n}" for n in range(LAYERS)), "model.norm.weight",
    ]  # fmt: skip
    assert layers[3] == ["1 of 1", "50.0 %", "4", "3", "1", "model.layers.1"]
    assert modules[1:] == [
        ["1 of 1", "50.0 %", "2", "1.5", "1", "head.weight"],
        ["12 of 12", "50.0 %", "24", "9.75", "1", "model.layers.*.up.weight"],
        ["0 of 1", "0 %", "0", "0", "0", "model.norm.weight"],
    ]


def test_every_tensor_in_natural_order(tmp_path: Path, capsys: Shown) -> None:
    a, b = checkpoint(tmp_path / "a", 1), checkpoint(tmp_path / "b", 0)
    assert run(command, ["diff", a, b, "--tensors"]) == 1
    _, rows = tables(capsys.readouterr().out)
    expected = ["head.weight", *(f"model.layers.{n}.up.weight" for n in range(LAYERS))]
    assert [row[-1] for row in rows[1:]] == expected
    assert rows[0] == [
        "elements", "largest", "mean", "rel. max", "rel. mean", "cosine", "change", "tensor",
    ]  # fmt: skip
    assert rows[1] == ["50.0 %", "2", "1.5", "1", "1", "-", "1", "head.weight"]
    assert run(command, ["diff", a, b, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in found["differences"]] == expected
    assert [one["name"] for one in found["layers"]] == [
        "head.weight", *(f"model.layers.{n}" for n in range(LAYERS)), "model.norm.weight",
    ]  # fmt: skip
    assert found["summary"]["differing"] == 26


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--top", "2", "--sort", "largest"], [11, 10]),
        (["--sort", "mean"], [*range(LAYERS - 1, -1, -1)]),
        (["--top", "3", "--sort", "name"], [0, 1]),
        (["--top", "3"], [0, 1]),
    ],
)
def test_rows_are_ordered_and_cut(
    flags: list[str], expected: list[int], tmp_path: Path, capsys: Shown
) -> None:
    a, b = checkpoint(tmp_path / "a", 1), checkpoint(tmp_path / "b", 0)
    assert run(command, ["diff", a, b, "--tensors", *flags]) == 1
    _, rows = tables(capsys.readouterr().out)
    names = [row[-1] for row in rows[1:]]
    assert [n for n in names if n != "head.weight"] == [
        f"model.layers.{n}.up.weight" for n in expected
    ]


def test_the_spectrum_is_shown_where_it_is_asked_for(tmp_path: Path, capsys: Shown) -> None:
    noise = np.random.default_rng(0).standard_normal((9, 20)).astype(np.float32)
    more = {"layers.0.a.weight": noise, "layers.0.b.weight": noise}
    a = checkpoint(tmp_path / "a", 1, **more)
    more = {"layers.0.a.weight": noise + 1, "layers.0.b.weight": noise[::-1].copy()}
    b = checkpoint(tmp_path / "b", 1, **more)
    assert run(command, ["diff", a, b, "--tensors", "--spectrum"]) == 1
    _, rows = tables(capsys.readouterr().out)
    assert rows[0][-3:] == ["rank 1", "rank 8", "tensor"]
    assert rows[1][-3] in ("100 %", "> 99.9 %")
    assert rows[1][-1] == "layers.0.a.weight"
    assert float(rows[2][-3].removesuffix(" %")) < 60


def test_what_is_on_one_side_only_is_not_mixed_with_values(tmp_path: Path, capsys: Shown) -> None:
    extra = {f"model.layers.{n}.bias": np.ones(2, np.float32) for n in range(3)}
    a, b = checkpoint(tmp_path / "a", 1, **extra), checkpoint(tmp_path / "b", 0)
    assert run(command, ["diff", a, b]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1 tensors are equal, 16 differ."
    assert lines[1].split(maxsplit=1)[1] == "16 of 17 differ (3 only in the first)"
    (row,) = [line for line in lines if line.endswith("model.layers.*.bias")]
    assert row.split() == [
        "3",
        "only",
        "in",
        "the",
        "first:",
        "float32",
        "(2,)",
        "model.layers.*.bias",
    ]


def test_equal_checkpoints(tmp_path: Path, capsys: Shown) -> None:
    a, b = checkpoint(tmp_path / "a", 1), checkpoint(tmp_path / "b", 1)
    assert run(command, ["diff", a, b]) == 0
    assert capsys.readouterr().out == "14 tensors are equal, 0 differ.\n"


@pytest.mark.parametrize(
    ("asked", "rows", "left"),
    [((), 40, "10 more tensors in 10 rows: --tensors shows all of them."),
     (("--top", "3"), 3, "47 more tensors in 47 rows: --tensors without --top shows all of them."),
     (("--top", "3", "--tensors"), 3,
      "47 more tensors in 47 rows: --tensors without --top shows all of them."),
     (("--tensors",), 50, None)],
)  # fmt: skip
def test_a_long_list_of_tensors_on_one_side_is_cut(
    tmp_path: Path, capsys: Shown, asked: tuple[str, ...], rows: int, left: str | None
) -> None:
    more = {f"other_{n}x": np.zeros(1, np.float32) for n in range(50)}
    a, b = checkpoint(tmp_path / "a", 1), checkpoint(tmp_path / "b", 1, **more)
    assert run(command, ["diff", a, b, *asked]) == 1
    shown = tables(capsys.readouterr().out)[1]
    assert shown[0] == ["tensors", "how", "tensor"]
    last = [] if left is None else [re.split(r" {2,}", left)]
    assert shown[1 + rows :] == last
    assert all(row[:2] == ["1", "only in the second: float32 (1,)"] for row in shown[1 : 1 + rows])
