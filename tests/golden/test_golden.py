"""What was read and written once is read and written still."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import reshard
from reshard.core import digests
from tests.golden.table import CONVERSIONS, GOLDEN, HERE, converted


def kept(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((HERE / name / "digests.json").read_text("utf-8"))
    return content


@pytest.mark.parametrize("name", GOLDEN)
def test_the_digests_are_those_of_the_live_ranks(name: str, tmp_path: Path) -> None:
    reshard.convert(HERE / name / "checkpoint", tmp_path / "out")
    stated = json.loads((tmp_path / "out" / "reshard.json").read_text(encoding="utf-8"))
    assert stated["tensors"] == kept(name)["tensors"]
    wrote = kept(name)["written by"]
    if "deepspeed" in wrote:
        assert stated["source"]["version"] == wrote["deepspeed"]


@pytest.mark.parametrize("what", CONVERSIONS)
@pytest.mark.parametrize("name", GOLDEN)
def test_the_same_input_gives_the_same_files_as_ever(name: str, what: str, tmp_path: Path) -> None:
    assert converted(name, CONVERSIONS[what], tmp_path / "out") == kept(name)["files"][what]


@pytest.mark.parametrize("name", ["hf", "dcp"])
def test_folders_that_were_written_before_digests_were_trees(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`written/`: of the first version of `reshard.json`, which states none."""
    monkeypatch.setattr(digests, "LEAF_NBYTES", 128)  # as if their tensors were large
    folder = HERE / "written" / name
    assert "version" not in json.loads((folder / "reshard.json").read_text(encoding="utf-8"))
    assert reshard.verify(folder).num_tensors > 0
    shutil.copytree(folder, tmp_path / "out")
    (weights,) = (path for path in (tmp_path / "out").iterdir() if path.suffix[:2] in (".s", ".d"))
    with weights.open("r+b") as file:
        file.seek(weights.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(reshard.ReshardError):
        reshard.verify(tmp_path / "out")


@pytest.mark.parametrize("name", GOLDEN)
def test_checkpoints_stay_small_and_hold_no_code(name: str) -> None:
    files = [path for path in (HERE / name / "checkpoint").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 50_000
    assert not [path for path in files if path.suffix == ".py"]
