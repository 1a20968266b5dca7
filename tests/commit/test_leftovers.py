"""What interrupted runs left beside an output, and names that leave no room for more."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

import reshard
from reshard.errors import WriteError
from reshard.transfer import commit, leftovers, system
from reshard.transfer.commit import OutputFolder
from tests.commit.conftest import listing


def write(target: Path, *, digest: str = "digest", overwrite: bool = False) -> list[str]:
    """A run that writes one file; the codes of its findings."""
    with OutputFolder(target, digest, overwrite=overwrite) as folder:
        folder.write("x", b"new")
        folder.commit()
    assert (target / "x").read_bytes() == b"new"
    return [finding.code for finding in folder.findings]


def partial(target: Path, digest: str = "another") -> Path:
    """What a killed run of `target` left."""
    own = leftovers.beside(target, f".partial-{digest}")
    (own / "new" / "deep").mkdir(parents=True)
    (own / "new" / "deep" / "x").write_bytes(b"123")
    leftovers.mark(own, target)
    return own


def test_of_another_plan_is_named_and_removed(tmp_path: Path) -> None:
    own = partial(tmp_path / "out")
    os.utime(own, (0, 0))
    with OutputFolder(tmp_path / "out", "digest") as folder:
        (finding,) = folder.findings
        assert finding.code == "partial-output"
        assert "days old" in finding.message
        assert finding.subject == str(own)
    assert listing(tmp_path) == []


@pytest.mark.parametrize("kind", ["of another output", "unmarked", "another user's", "a file"])
def test_of_others_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    own = partial(tmp_path / "out")
    if kind == "of another output":
        (own / "run.json").write_text('{"reshard": "1", "target": "other"}')
    elif kind == "unmarked":
        (own / "run.json").unlink()
    elif kind == "a file":
        own.rename(tmp_path / "elsewhere")
        own.write_bytes(b"123")
    else:
        mine = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    before = listing(tmp_path)
    codes = write(tmp_path / "out")
    assert codes == ([] if kind == "a file" else ["partial-output-kept"])
    assert listing(tmp_path) == sorted([*before, "out", "out/x"])


def test_an_old_output_is_put_back(tmp_path: Path) -> None:
    """The run was killed between the two renames of a system that cannot exchange folders."""
    own = partial(tmp_path / "out")
    (own / "old").mkdir()
    (own / "old" / "precious").touch()
    with (
        pytest.raises(WriteError, match=r"exists.*it is back in its place"),
        OutputFolder(tmp_path / "out", "digest"),
    ):
        pass
    assert listing(tmp_path / "out") == ["precious"]


def test_an_old_output_is_put_back_and_replaced(tmp_path: Path) -> None:
    own = partial(tmp_path / "out")
    (own / "old").mkdir()
    (own / "old" / "precious").touch()
    codes = write(tmp_path / "out", overwrite=True)
    assert codes == ["old-output-restored", "partial-output"]
    assert listing(tmp_path) == ["out", "out/x"]


def test_an_old_output_is_not_put_in_the_place_of_anything(tmp_path: Path) -> None:
    own = partial(tmp_path / "out")
    (own / "old").mkdir()
    (tmp_path / "out").mkdir()
    assert write(tmp_path / "out") == ["partial-output"]
    assert listing(tmp_path) == ["out", "out/x"]


@pytest.mark.parametrize("exchanges", [True, False])
def test_an_old_output_that_cannot_be_deleted_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool
) -> None:
    if not exchanges:
        monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())
    target = tmp_path / "out"
    target.mkdir()
    (target / "stuck").touch()
    (target / "loose").touch()
    unlink = os.unlink

    def fail(name: str, *, dir_fd: int | None = None) -> None:
        if name == "stuck":
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        unlink(name, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", fail)
    assert write(target, overwrite=True) == ["old-output-kept"]
    (left,) = tmp_path.glob(".out.partial-*")
    assert [name for name in listing(left) if "/" in name] == [
        f"{'new' if exchanges else 'old'}/stuck"
    ]
    monkeypatch.undo()
    assert write(target, overwrite=True) == ["partial-output"]
    assert listing(tmp_path) == ["out", "out/x"]


@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize("overwrite", [True, False])
def test_what_cannot_be_made_durable_is_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool, overwrite: bool
) -> None:
    """The rename was done, and syncing the folder above it fails."""
    if not exchanges:
        monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())
    target = tmp_path / "out"
    if overwrite:
        target.mkdir()
        (target / "old").touch()
    before = listing(tmp_path)

    def fail(folder: Path) -> None:
        if folder == tmp_path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        system.sync_folder(folder)

    monkeypatch.setattr(commit, "sync_folder", fail)
    with OutputFolder(target, "digest", overwrite=overwrite) as folder:
        folder.write("x", b"new")
        with pytest.raises(WriteError, match="cannot be written: Input/output error"):
            folder.commit()
    assert listing(tmp_path) == before


def test_an_old_output_that_cannot_be_put_back_is_not_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No exchange, and every rename after the first fails: the next run puts it back."""
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())
    target = tmp_path / "out"
    target.mkdir()
    (target / "precious").touch()
    rename = Path.rename

    def fail(path: Path, to: Path) -> Path:
        if to == target:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(path, to)

    with OutputFolder(target, "digest", overwrite=True) as folder:
        folder.write("x", b"new")
        monkeypatch.setattr(Path, "rename", fail)
        with pytest.raises(WriteError, match=r"The old output lies at .*/old\."):
            folder.commit()
    assert not target.exists()
    monkeypatch.undo()
    with pytest.raises(WriteError, match="exists"), OutputFolder(target, "digest"):
        pass
    assert listing(target) == ["precious"]


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_folder_that_takes_the_place_of_the_output_is_not_replaced(
    tmp_path: Path, overwrite: bool
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    if overwrite:
        (target / "old").touch()
    with OutputFolder(target, "digest", overwrite=overwrite) as folder:
        folder.write("x", b"new")
        target.rename(tmp_path / "moved")
        target.mkdir()
        (target / "theirs").touch()
        with pytest.raises(WriteError, match="something else appeared"):
            folder.commit()
    assert (target / "theirs").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["moved", "out"]


def test_a_lock_that_was_removed_ends_the_run(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "out", "digest") as folder:
        folder.write("x", b"new")
        (tmp_path / ".out.lock").unlink()
        with pytest.raises(WriteError, match="the lock file was removed"):
            folder.commit()
    assert listing(tmp_path) == []


@pytest.mark.parametrize("name", ["n" * 255, "ü" * 127, "n" * 240])
def test_names_as_long_as_the_system_takes(tmp_path: Path, name: str) -> None:
    target = tmp_path / name
    partial(target, "0" * 16)
    assert write(target) == ["partial-output"]
    assert write(target, overwrite=True) == []
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_two_long_names_do_not_meet(tmp_path: Path) -> None:
    one, other = tmp_path / ("n" * 254 + "1"), tmp_path / ("n" * 254 + "2")
    with OutputFolder(one, "digest") as first, OutputFolder(other, "digest") as second:
        first.commit()
        second.commit()
    assert sorted(path.name[-1] for path in tmp_path.iterdir()) == ["1", "2"]


def test_a_base_whose_files_have_long_and_temporary_names(model: Path, tmp_path: Path) -> None:
    names = ["m" * 250 + ".json", ".config.json.tmp", "tmp", "new", "run.json"]
    for name in names:
        (model / name).write_text("{}")
    reshard.convert(model, tmp_path / "out", base=model, allow_unchanged=True)
    assert {path.name for path in (tmp_path / "out").iterdir()} >= set(names)


@pytest.mark.parametrize("where", ["source", "base model"])
def test_an_output_inside_an_input(model: Path, tmp_path: Path, where: str) -> None:
    other = tmp_path / "other"
    other.mkdir()
    save_file(load_file(model / "model.safetensors"), other / "model.safetensors")
    source, base = (model, other) if where == "source" else (other, model)
    before = listing(tmp_path)
    with pytest.raises(WriteError, match=f"lies inside the {where}"):
        reshard.convert(source, model / "chat" / "out", base=base, allow_unchanged=True)
    assert listing(tmp_path) == before
