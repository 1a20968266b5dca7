"""The output folder: what is synced before what is renamed, and what is left when writing fails."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import reshard
from reshard.catalog import Asset
from reshard.transfer import commit, engine
from reshard.transfer.commit import OutputFolder, check_space
from reshard.transfer.fill import fill

SRC = Path(__file__).parents[1] / "src"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder of two tensors, with files in sub-folders."""
    folder = tmp_path / "model"
    (folder / "chat" / "templates").mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    (folder / "chat" / "templates" / "plain.jinja").write_text("{{ x }}", encoding="utf-8")
    tensors = {"w": np.arange(3000, dtype=np.float32).reshape(30, 100), "b": np.ones(7, np.int64)}
    save_file(tensors, folder / "model.safetensors")
    return folder


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# The order of system calls


@dataclass(frozen=True)
class Call:
    """A call that succeeded. `to` and `flags` are a rename's."""

    name: str
    path: str
    to: str = ""
    flags: str = ""


def check_order(calls: list[Call], target: Path, flags: str) -> None:
    """Each file is synced before it gets its name, and all names before the folder gets its own."""
    final = [number for number, call in enumerate(calls) if call.to == str(target)]
    assert len(final) == 1
    last = calls[final[0]]
    assert (last.name, last.flags) == ("renameat2", flags)
    partial = last.path
    assert Path(partial).parent == target.parent
    renames = {c.to: number for number, c in enumerate(calls) if c.name == "rename"}
    files = [path for path in target.rglob("*") if path.is_file()]
    assert sorted(renames) == sorted(f"{partial}/{path.relative_to(target)}" for path in files)
    for name, renamed in renames.items():
        temporary = calls[renamed].path
        assert Path(temporary).parent == Path(name).parent
        written = [n for n, c in enumerate(calls) if (c.name, c.path) == ("write", temporary)]
        synced = [n for n, c in enumerate(calls) if (c.name, c.path) == ("fsync", temporary)]
        folder = str(Path(name).parent)
        listed = [n for n, c in enumerate(calls) if (c.name, c.path) == ("fsync", folder)]
        assert written
        assert max(written) < max(synced) < renamed, name
        assert any(renamed < n < final[0] for n in listed), name
    assert max(renames, key=renames.__getitem__) == f"{partial}/reshard.json"
    after = calls[final[0] + 1 :]
    synced_parent = after.index(Call("fsync", str(target.parent)))
    removed = [n for n, call in enumerate(after) if call.name == "remove"]
    assert all(n > synced_parent for n in removed)
    assert bool(removed) == (flags == "RENAME_EXCHANGE")


def traced(command: list[str], log: Path) -> list[Call]:
    """The calls of a command and its threads, in the order in which they returned."""
    names = "fsync,rename,renameat,renameat2,pwrite64,unlinkat,rmdir"
    environment = {**os.environ, "PYTHONPATH": str(SRC)}
    strace = ["strace", "-f", "-y", "-s", "4096", "-o", str(log), "-e", f"trace={names}"]
    subprocess.run([*strace, *command], env=environment, check=True, capture_output=True)
    calls, begun = [], {}
    for line in log.read_text(encoding="utf-8").splitlines():
        thread, _, rest = line.partition(" ")
        if rest.endswith("<unfinished ...>"):
            begun[thread] = rest.removesuffix("<unfinished ...>")
            continue
        if resumed := re.match(r"\s*<\.\.\. \w+ resumed>(.*)", rest):
            rest = begun.pop(thread) + resumed[1]
        if call := parse(rest.strip()):
            calls.append(call)
    return calls


def parse(line: str) -> Call | None:
    """A line of strace, without the thread; None where the call failed or is of no interest."""
    found = re.fullmatch(r"(\w+)\((.*)\)\s+= (\d+)", line)
    if found is None:
        return None
    name, arguments = found[1], found[2]
    if name in ("fsync", "pwrite64"):
        path = re.match(r"\d+<(.*?)>", arguments)
        assert path
        return Call("write" if name == "pwrite64" else name, path[1])
    quoted = re.findall(r'"((?:[^"\\]|\\.)*)"', arguments)
    if name in ("unlinkat", "rmdir"):
        return Call("remove", quoted[0])
    flags = arguments.rpartition(", ")[2] if name == "renameat2" else ""
    return Call(name, quoted[0], quoted[1], flags)


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
@pytest.mark.parametrize("overwrite", [False, True])
def test_the_order_of_system_calls(model: Path, tmp_path: Path, overwrite: bool) -> None:
    target = tmp_path / "out"
    command = [sys.executable, "-m", "reshard", "convert", str(model), str(target)]
    command += ["--base", str(model), "--allow-unchanged", "--threads", "2"]
    if overwrite:
        target.mkdir()
        (target / "old.json").touch()
        command.append("--overwrite")
    flags = "RENAME_EXCHANGE" if overwrite else "RENAME_NOREPLACE"
    check_order(traced(command, tmp_path / "log"), target, flags)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """The same calls, as this process makes them."""
    calls: list[Call] = []

    def path(fd: int) -> str:
        return str(Path(f"/proc/self/fd/{fd}").readlink())

    def wrap(owner: Any, name: str, describe: Callable[..., Call]) -> None:
        original = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            described = describe(*arguments)
            result = original(*arguments, **options)
            calls.append(described)
            return result

        monkeypatch.setattr(owner, name, call)

    flags = {0: "0", 1: "RENAME_NOREPLACE", 2: "RENAME_EXCHANGE"}
    wrap(os, "fsync", lambda fd: Call("fsync", path(fd)))
    wrap(os, "pwrite", lambda fd, *_: Call("write", path(fd)))
    wrap(os, "rename", lambda a, b, **_: Call("rename", str(a), str(b)))
    wrap(shutil, "rmtree", lambda folder, *_: Call("remove", str(folder)))
    wrap(commit, "_rename", lambda a, b, f: Call("renameat2", str(a), str(b), flags[f]))
    return calls


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("overwrite", [False, True])
def test_the_order_of_calls_in_this_process(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recorded: list[Call],
    threads: int,
    overwrite: bool,
) -> None:
    monkeypatch.setattr(engine, "_BLOCK", 1024)
    target = tmp_path / "out"
    if overwrite:
        target.mkdir()
        (target / "old.json").touch()
    reshard.convert(
        model, target, base=model, allow_unchanged=True, overwrite=overwrite, threads=threads
    )
    check_order(recorded, target, "RENAME_EXCHANGE" if overwrite else "RENAME_NOREPLACE")
    assert not (target / "old.json").exists()


# What is left when writing fails


@pytest.mark.parametrize("room", [0, 5_000, 12_100])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_disk_that_fills_up_leaves_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int, threads: int
) -> None:
    """The disk is full within the weights, and (12,100 bytes on) within the small files."""
    monkeypatch.setattr(engine, "_BLOCK", 1024)
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
        "import resource, sys; from reshard.cli import main\n"
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


def test_a_disk_without_room_is_found_beforehand(tmp_path: Path) -> None:
    with pytest.raises(reshard.WriteError, match=r"1,000,000,000,000,000,000 bytes .* are free"):
        check_space(tmp_path / "not" / "there", 10**18)


# Several at once


def test_the_same_conversion_twice_at_once(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = threading.Barrier(2)

    def slow(*arguments: Any) -> None:
        time.sleep(0.1)
        fill(*arguments)

    monkeypatch.setattr(engine, "fill", slow)
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
    assert "another process is writing" in str(refused)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]
    assert reshard.verify(tmp_path / "out")


def test_two_conversions_into_one_folder(tmp_path: Path) -> None:
    """Different ones do not meet on the way; the one that ends last is refused."""
    target = tmp_path / "out"
    with OutputFolder(target, "first") as first, OutputFolder(target, "second") as second:
        first.write("x", b"first")
        second.write("x", b"second")
        first.commit()
        with pytest.raises(reshard.WriteError, match="File exists"):
            second.commit()
    assert (target / "x").read_bytes() == b"first"
    assert listing(tmp_path) == ["out", "out/x"]


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
    assert listing(tmp_path / "out") == ["model.safetensors", "reshard.json"]


def test_files_in_sub_folders(model: Path, tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "out", "digest") as folder:
        folder.copy(Asset("a/b/c.jinja", model / "chat" / "templates" / "plain.jinja"))
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
    (left / "deep").mkdir(parents=True)
    (left / "deep" / "x").touch()
    (left / "y").touch()
    (left / "link").symlink_to(tmp_path)
    with OutputFolder(tmp_path / "out", "digest") as folder:
        folder.write("z", b"")
        folder.commit()
    assert listing(tmp_path) == ["out", "out/z"]


def test_everyone_may_read_what_the_umask_allows(model: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        reshard.convert(model, tmp_path / "out", base=model, allow_unchanged=True)
    finally:
        os.umask(before)
    for path in (tmp_path / "out", *(tmp_path / "out").rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path
