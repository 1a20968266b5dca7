"""`verify --against` and `diff`: two checkpoints of any formats, tensor by tensor."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import reshard
from reshard.cli import reshard as command
from reshard.cli import run
from tests.oracle.cache import Oracle

LLAMAS = ["llama-zero2", "llama-tied-zero3"]


@pytest.mark.parametrize("name", LLAMAS)
def test_a_conversion_is_verified_against_its_source(
    oracle: Oracle, name: str, tmp_path: Path
) -> None:
    case = oracle[name]
    out = tmp_path / "out"
    report = reshard.convert(case.root, out, base=case.base)
    assert reshard.verify(out, against=case.root).num_tensors == report.num_tensors
    assert run(command, ["verify", str(out), "--against", str(case.last.path)]) == 0


def test_one_changed_element_is_found_though_the_digests_were_changed_too(
    oracle: Oracle, tmp_path: Path
) -> None:
    case = oracle["llama-zero2"]
    out = tmp_path / "out"
    reshard.convert(case.root, out, base=case.base)
    with (out / "model.safetensors").open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    (out / "reshard.json").unlink()
    with pytest.raises(reshard.VerificationError, match=r"1 of \d+ elements differ"):
        reshard.verify(out, against=case.root)
    assert run(command, ["verify", str(out), "--against", str(case.root)]) == 1


def test_an_older_save_is_another_checkpoint(oracle: Oracle, tmp_path: Path) -> None:
    case = oracle["two-tags"]
    reshard.convert(case.root, tmp_path / "out", tag="global_step1")
    reshard.verify(tmp_path / "out", against=case.root, tag="global_step1")
    with pytest.raises(reshard.VerificationError):
        reshard.verify(tmp_path / "out", against=case.root, tag="global_step2")


def test_a_checkpoint_equals_itself_in_another_format(oracle: Oracle, tmp_path: Path) -> None:
    case = oracle["llama-zero3"]
    reshard.convert(case.root, tmp_path / "dcp", to="dcp")
    comparison = reshard.diff(case.root, tmp_path / "dcp")
    assert comparison.same
    assert comparison.num_equal == len(reshard.open(case.root).catalog.entries)


def test_diff_measures_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {
        "same": np.arange(6, dtype=np.float32),
        "moved": np.zeros((2, 3), np.float32),
        "shape": np.zeros(3, np.float32),
        "dtype": np.zeros(3, np.int64),
        "gone": np.zeros(1, np.float32),
        "nan": np.array([np.nan, 1], np.float32),
    }
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    save_file(values, tmp_path / "a" / "model.safetensors")
    changed = dict(values)
    del changed["gone"]
    changed["moved"] = np.array([[0, 0, 0.5], [0, 0, -1.5]], np.float32)
    changed["shape"] = np.zeros(4, np.float32)
    changed["dtype"] = np.zeros(3, np.int32)
    changed["new"] = np.zeros(1, np.float32)
    save_file(changed, tmp_path / "b" / "model.safetensors")
    assert run(command, ["diff", str(tmp_path / "a"), str(tmp_path / "b"), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    by_name = {difference["name"]: difference for difference in found["differences"]}
    assert found["num_equal"] == 2
    assert {name: d["kind"] for name, d in by_name.items()} == {
        "moved": "values",
        "shape": "shape",
        "dtype": "dtype",
        "gone": "only in the first",
        "new": "only in the second",
    }
    moved = by_name["moved"]
    assert (moved["differing"], moved["largest"], moved["mean"]) == (2, 1.5, 1.0)
    assert run(command, ["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    assert "2 tensors are equal, 5 differ." in capsys.readouterr().out
    assert run(command, ["diff", str(tmp_path / "a"), str(tmp_path / "a")]) == 0


def test_masters_are_rounded_before_they_are_compared(oracle: Oracle, tmp_path: Path) -> None:
    case = oracle["llama-zero2"]
    shutil.copytree(case.base, tmp_path / "model")
    masters = case.last.masters()
    base = load_file(case.base / "model.safetensors")
    save_file(
        {name: masters[name].astype(base[name].dtype) for name in base},
        tmp_path / "model" / "model.safetensors",
        {"format": "pt"},
    )
    assert reshard.diff(case.root, tmp_path / "model").same
    assert not reshard.diff(case.root, case.base).same
