"""The output folder: several at once, systems without renameat2, and what the folder holds."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import reshard
from reshard.conversion import execute
from reshard.storage.local import Sources
from reshard.storage.source import Source
from reshard.transfer import leftovers, making
from reshard.transfer.commit import OutputFolder
from reshard.transfer.fill import fill
from reshard.transfer.output import Output, copy
from tests.commit.conftest import listing

# Several at once


def test_the_same_conversion_twice_at_once(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = threading.Barrier(2)

    def slow(*arguments: Any) -> None:
        time.sleep(0.1)
        fill(*arguments)

    monkeypatch.setattr(making, "fill", slow)
    outcomes: list[object] = []

    def convert() -> None:
        both.wait()
        try:
            outcomes.append(reshard.convert(model, tmp_path / "out").verified)
        except reshard.WriteError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=convert) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count(True) == 1, outcomes
    (refused,) = (outcome for outcome in outcomes if outcome is not True)
    assert "is writing this output" in str(refused)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]
    assert reshard.verify(tmp_path / "out")


def test_two_conversions_into_one_folder(tmp_path: Path) -> None:
    """Whatever their plans: the second is refused at once, and the first goes on."""
    target = tmp_path / "out"
    with OutputFolder(target, "first") as first:
        first.write("x", b"first")
        with pytest.raises(reshard.WriteError, match=r"process \d+ on .* is writing this output"):
            OutputFolder(target, "second").__enter__()
        first.commit()
    assert (target / "x").read_bytes() == b"first"
    assert listing(tmp_path) == ["out", "out/x"]


@pytest.mark.parametrize("there", ["full", "empty", "nothing"])
def test_a_link_stays_and_what_it_names_is_written(tmp_path: Path, there: str) -> None:
    """The folder may lie on another disk: the partial folder is beside it, not beside the link."""
    (tmp_path / "disk").mkdir()
    place = tmp_path / "disk" / "model"
    if there != "nothing":
        place.mkdir()
    if there == "full":
        (place / "old").touch()
        with pytest.raises(reshard.WriteError, match="not empty"), OutputFolder(place, "digest"):
            pass
    link = tmp_path / "latest"
    link.symlink_to("disk/model")
    with OutputFolder(link, "digest", overwrite=there == "full") as folder:
        assert folder.partial.parent.parent == tmp_path / "disk"
        folder.write("x", b"new")
        folder.commit()
    assert link.is_symlink()
    assert listing(tmp_path / "disk") == ["model", "model/x"]


def test_a_loop_of_links_is_one_error(model: Path, tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    with pytest.raises(reshard.WriteError):
        reshard.convert(model, loop)
    with pytest.raises(reshard.NotFoundError):
        reshard.convert(loop, tmp_path / "out")
    assert loop.is_symlink()
    assert not (tmp_path / "out").exists()


def appear_as_file(target: Path) -> None:
    target.write_bytes(b"theirs")


def appear_as_folder(target: Path) -> None:
    target.mkdir()
    (target / "theirs").touch()


def appear_as_link(target: Path) -> None:
    target.symlink_to("nowhere")


@pytest.mark.parametrize("appear", [appear_as_file, appear_as_folder, appear_as_link])
@pytest.mark.parametrize("system", ["renameat2", "without"])
def test_what_appears_meanwhile_is_not_replaced(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    appear: Callable[[Path], None],
    system: str,
) -> None:
    if system == "without":
        monkeypatch.setattr(ctypes, "CDLL", WithoutRenameat2)
    target = tmp_path / "out"
    with OutputFolder(target, "digest") as folder:
        folder.write("x", b"ours")
        appear(target)
        before = target.lstat().st_ino
        with pytest.raises(reshard.WriteError):
            folder.commit()
    assert target.lstat().st_ino == before
    assert not (target / "x").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# Systems without renameat2


class WithoutRenameat2:
    """A C library that lacks the function."""

    def __init__(self, name: object, **options: object) -> None: ...


class Unimplemented:
    """A C library whose kernel or file system does not know the call."""

    def __init__(self, name: object, **options: object) -> None: ...

    def renameat2(self, *arguments: object) -> int:
        ctypes.set_errno(errno.ENOSYS)
        return -1


class Unsupporting(Unimplemented):
    def renameat2(self, *arguments: object) -> int:
        ctypes.set_errno(errno.EINVAL)
        return -1


@pytest.mark.parametrize("library", [WithoutRenameat2, Unimplemented, Unsupporting])
def test_without_renameat2(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: type
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", library)
    target = tmp_path / "out"
    reshard.convert(model, target)
    assert load_file(target / "model.safetensors")["w"].dtype == np.float32
    with pytest.raises(reshard.WriteError, match="exists"):
        reshard.convert(model, target)
    reshard.convert(model, target, dtype="float16", overwrite=True)
    assert load_file(target / "model.safetensors")["w"].dtype == np.float16
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


# Systems that cannot reserve room


class Reserving(Unimplemented):
    """A C library whose file system answers `code` to fallocate."""

    code = errno.EOPNOTSUPP

    def fallocate64(self, *arguments: object) -> int:
        ctypes.set_errno(self.code)
        return -1


class Full(Reserving):
    code = errno.ENOSPC


def test_a_file_system_that_cannot_reserve(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", Reserving)
    reshard.convert(model, tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors")["w"].dtype == np.float32


def test_a_file_system_that_is_full(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", Full)
    with pytest.raises(reshard.WriteError, match="No space left on device"):
        reshard.convert(model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_another_error_of_renameat2_is_an_error(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(Unimplemented):
        def renameat2(self, *arguments: object) -> int:
            ctypes.set_errno(errno.EROFS)
            return -1

    monkeypatch.setattr(ctypes, "CDLL", Failing)
    with pytest.raises(reshard.WriteError, match="Read-only file system"):
        reshard.convert(model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# What the folder holds


def test_an_empty_folder_may_be_the_output(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    reshard.convert(model, tmp_path / "out")
    assert (tmp_path / "out" / "reshard.json").is_file()
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_files_in_sub_folders(model: Path, tmp_path: Path) -> None:
    with Sources() as sources, OutputFolder(tmp_path / "out", "digest") as folder:
        copy(folder, "a/b/c.jinja", sources.open(model / "chat" / "templates" / "plain.jinja"))
        folder.write("a/d.json", b"{}")
        folder.write("e.json", b"[]")
        folder.commit()
    files = [path for path in listing(tmp_path / "out") if (tmp_path / "out" / path).is_file()]
    assert files == ["a/b/c.jinja", "a/d.json", "e.json"]
    assert (tmp_path / "out" / "a" / "b" / "c.jinja").read_text(encoding="utf-8") == "{{ x }}"


def test_files_of_the_base_come_along_in_their_sub_folders(model: Path, tmp_path: Path) -> None:
    reshard.convert(model, tmp_path / "out", base=model, allow_unchanged=True)
    assert listing(tmp_path / "out") == [
        "chat",
        "chat/templates",
        "chat/templates/plain.jinja",
        "config.json",
        "model.safetensors",
        "reshard.json",
    ]


def test_what_a_killed_run_left_is_not_used(tmp_path: Path) -> None:
    left = tmp_path / ".out.partial-digest"
    (left / "new" / "deep").mkdir(parents=True)
    (left / "new" / "deep" / "x").touch()
    (left / "new" / "link").symlink_to(tmp_path)
    leftovers.mark(left, tmp_path / "out")
    with OutputFolder(tmp_path / "out", "digest") as folder:
        folder.write("z", b"")
        folder.commit()
    (finding,) = folder.findings
    assert finding.code == "partial-output"
    assert listing(tmp_path) == ["out", "out/z"]


def test_a_link_in_place_of_the_partial_folder_is_not_followed(tmp_path: Path) -> None:
    """Somebody who may write beside the output could have anything emptied."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "x").touch()
    (tmp_path / ".out.partial-digest").symlink_to("theirs")
    before = listing(tmp_path)
    with pytest.raises(reshard.WriteError, match="no run of this user created it"):
        OutputFolder(tmp_path / "out", "digest").__enter__()
    assert listing(tmp_path) == before


def test_folders_made_for_an_output_that_cannot_begin_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(reshard.WriteError, match="Input/output error"):
        OutputFolder(tmp_path / "new" / "out", "digest").__enter__()
    assert listing(tmp_path) == []


def test_an_exchange_without_renameat2_that_fails_keeps_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", WithoutRenameat2)
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").touch()
    rename = Path.rename

    def fail(path: Path, to: Path) -> Path:
        if path.name == "new":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(path, to)

    with OutputFolder(target, "digest", overwrite=True) as folder:
        folder.write("new", b"")
        monkeypatch.setattr(Path, "rename", fail)
        with pytest.raises(reshard.WriteError, match="Input/output error"):
            folder.commit()
    assert listing(tmp_path) == ["out", "out/old"]


@pytest.mark.parametrize("change", ["grow", "shrink", "rewrite"])
def test_a_file_of_the_base_that_changes_meanwhile(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    path = model / "chat" / "templates" / "plain.jinja"

    def copied(folder: Output, name: str, source: Source) -> None:
        if change != "shrink":
            copy(folder, name, source)
        if name.endswith("plain.jinja"):
            path.write_text(
                {"grow": "{{ x }} and more", "shrink": "{{", "rewrite": "{{ y }}"}[change]
            )
        if change == "shrink":
            copy(folder, name, source)

    monkeypatch.setattr(execute, "copy", copied)
    with pytest.raises(reshard.IncompleteError, match=r"changed while|the file ends at"):
        reshard.convert(model, tmp_path / "out", base=model, allow_unchanged=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_everyone_may_read_what_the_umask_allows(model: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        reshard.convert(model, tmp_path / "out", base=model, allow_unchanged=True)
    finally:
        os.umask(before)
    for path in (tmp_path / "out", *(tmp_path / "out").rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path
