"""What is synced before what is renamed: in a trace of the system calls, and in this process."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import reshard
from reshard.transfer import leftovers, making, system

pytestmark = pytest.mark.heavy

SRC = Path(__file__).parents[2] / "src"


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
    assert Path(partial).parent.parent == target.parent
    renames = {c.to: number for number, c in enumerate(calls) if c.name == "rename"}
    files = [path for path in target.rglob("*") if path.is_file()]
    assert sorted(renames) == sorted(f"{partial}/{path.relative_to(target)}" for path in files)
    for name, renamed in renames.items():
        temporary = calls[renamed].path
        assert Path(temporary).parent == Path(partial).with_name("tmp")
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
    assert removed


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
        reshard.convert(model, target, dtype="float16")
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
    wrap(leftovers, "remove_tree", lambda folder, *_: Call("remove", str(folder)))
    wrap(system, "_renameat2", lambda a, b, f: Call("renameat2", str(a), str(b), flags[f]))
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
    monkeypatch.setattr(making, "_BLOCK", 1024)
    target = tmp_path / "out"
    if overwrite:
        reshard.convert(model, target, dtype="float16")
        recorded.clear()
    reshard.convert(
        model, target, base=model, allow_unchanged=True, overwrite=overwrite, threads=threads
    )
    check_order(recorded, target, "RENAME_EXCHANGE" if overwrite else "RENAME_NOREPLACE")
    assert (target / "config.json").exists()
