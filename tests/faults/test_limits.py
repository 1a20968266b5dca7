"""Disks that fill up, limits of the process, and sources that change while they are read."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import reshard
from reshard.transfer import making
from reshard.transfer.fill import fill

SRC = Path(__file__).parents[2] / "src"
NBYTES = 400_000


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    for number in range(12):
        (folder / f"template-{number}.jinja").write_text("{{ x }}", encoding="utf-8")
    tensors = {"a": np.ones(NBYTES // 8, np.float32), "b": np.ones(NBYTES // 8, np.float32)}
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts small file systems in memory: `size=...,nr_inodes=...`."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        place = tmp_path / f"disk-{len(mounted)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(place)]
        if os.geteuid() or not shutil.which("mount") or subprocess.run(command).returncode:
            pytest.skip("mounting a small file system needs the rights of root")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "-l", str(place)], check=True)


def old_output(model: Path, place: Path) -> dict[str, bytes]:
    """Write a small output of reshard to `place/out`; its files."""
    small = model.parent / "small"
    small.mkdir()
    save_file({"a": np.ones(4, np.float32)}, small / "model.safetensors")
    reshard.convert(small, place / "out")
    return files(place / "out")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def convert(model: Path, target: Path, **options: Any) -> None:
    reshard.convert(model, target, base=model, allow_unchanged=True, threads=1, **options)


@pytest.mark.parametrize("options", ["size=300k", "size=1m,nr_inodes=14"], ids=["full", "inodes"])
def test_a_small_file_system(
    model: Path,
    disk: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    options: str,
) -> None:
    """Its room or its inodes do not suffice: a stated error, and the old output stands."""
    place = disk(options)
    old = old_output(model, place)
    # Also where the check beforehand was right then, and another program filled the disk.
    for checked in (True, False):
        if not checked:
            monkeypatch.setattr("reshard.transfer.commit.lacking_space", lambda *_: None)
        with pytest.raises(reshard.WriteError, match=r"are free|No space left"):
            convert(model, place / "out", overwrite=True)
        assert files(place / "out") == old
        assert [path.name for path in place.iterdir()] == ["out"]


@pytest.mark.heavy
@pytest.mark.parametrize("limit", [1_000, 100_000, NBYTES])
def test_a_limit_on_the_size_of_files(model: Path, tmp_path: Path, limit: int) -> None:
    place = tmp_path / "place"
    place.mkdir()
    old = old_output(model, place)
    code = (
        "import resource, sys; from reshard.cli.app import main\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "convert", str(model), str(place / "out"), "--overwrite"],
        env={**os.environ, "PYTHONPATH": str(SRC), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert "File too large" in done.stderr
    assert files(place / "out") == old
    assert [path.name for path in place.iterdir()] == ["out"]


def shrink(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def rewrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"\1" * 8)
    os.utime(path, ns=(1, 1))


def replace(path: Path) -> None:
    path.with_name("other").write_bytes(path.read_bytes())
    path.with_name("other").replace(path)


@pytest.mark.parametrize("change", [shrink, grow, rewrite, replace, Path.unlink])
@pytest.mark.parametrize("what", ["model.safetensors", "config.json"])
def test_a_source_that_changes(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], None],
    what: str,
) -> None:
    """Weights, or a file of the base, change after the first tensor was read."""
    place = tmp_path / "place"
    place.mkdir()
    old = old_output(model, place)
    count = 0

    def changing(*arguments: Any) -> None:
        nonlocal count
        fill(*arguments)
        count += 1
        if count == 1:
            change(model / what)

    monkeypatch.setattr(making, "fill", changing)
    with pytest.raises(reshard.ReshardError, match=r"changed while|the file ends at|no such file"):
        convert(model, place / "out", overwrite=True)
    assert files(place / "out") == old
    assert [path.name for path in place.iterdir()] == ["out"]
