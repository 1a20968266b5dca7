"""What is left when writing fails: nothing, and what was there before."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import reshard
from reshard.transfer import making
from reshard.transfer.commit import OutputFolder
from reshard.transfer.targets import check_space
from tests.commit.conftest import listing

SRC = Path(__file__).parents[2] / "src"


@pytest.mark.parametrize("room", [0, 5_000, 12_100])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_disk_that_fills_up_leaves_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int, threads: int
) -> None:
    """The disk is full within the weights, and (12,100 bytes on) within the small files."""
    monkeypatch.setattr(making, "_BLOCK", 1024)
    original, left = os.pwrite, room

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        nonlocal left
        if left <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = original(fd, data[:left], offset)
        left -= done
        return done

    monkeypatch.setattr(os, "pwrite", pwrite)
    before = listing(tmp_path)
    with pytest.raises(reshard.WriteError, match="No space left on device"):
        reshard.convert(
            model, tmp_path / "new" / "out", base=model, allow_unchanged=True, threads=threads
        )
    assert listing(tmp_path) == before


def test_a_limit_of_the_system_leaves_nothing(model: Path, tmp_path: Path) -> None:
    code = (
        "import resource, sys; from reshard.cli.app import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        "main()"
    )
    before = listing(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", code, "convert", str(model), str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": str(SRC), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert "File too large" in done.stderr
    assert listing(tmp_path) == before


@pytest.mark.parametrize("failing", ["fsync", "rename", "truncate"])
def test_a_call_that_fails_leaves_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    before = listing(tmp_path)
    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(reshard.WriteError, match="Input/output error"):
        reshard.convert(model, tmp_path / "out")
    assert listing(tmp_path) == before


def test_an_existing_output_outlives_a_failed_overwrite(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reshard.convert(model, tmp_path / "out")
    before = listing(tmp_path)

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(reshard.WriteError):
        reshard.convert(model, tmp_path / "out", dtype="float16", overwrite=True)
    assert listing(tmp_path) == before
    monkeypatch.undo()
    assert reshard.verify(tmp_path / "out")


def test_a_parent_that_is_a_file(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(reshard.ReshardError):
        reshard.convert(model, tmp_path / "file" / "out")
    assert (tmp_path / "file").is_file()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a folder that even root cannot change")
def test_a_parent_that_takes_no_folders() -> None:
    with pytest.raises(reshard.WriteError, match="it cannot be written"):
        OutputFolder(Path("/proc/reshard-out"), "digest").__enter__()


@pytest.mark.skipif(os.getuid() == 0, reason="root may write to a read-only folder")
def test_a_read_only_parent(model: Path, tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    parent.mkdir(mode=0o500)
    with pytest.raises(reshard.WriteError, match="Permission denied"):
        reshard.convert(model, parent / "out")


def test_a_file_that_finds_no_room_is_not_begun(tmp_path: Path) -> None:
    with (
        OutputFolder(tmp_path / "out", "digest") as folder,
        pytest.raises(reshard.WriteError, match=r"No space left|File too large"),
    ):
        folder.create("model.safetensors", 1 << 60)
    assert listing(tmp_path) == []


def test_a_disk_without_room_is_found_beforehand(tmp_path: Path) -> None:
    with pytest.raises(reshard.WriteError, match=r"1,000,000,000,000,000,000 bytes .* are free"):
        check_space(tmp_path / "not" / "there", 10**18)
