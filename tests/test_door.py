"""Files and folders are looked at in one room, and what the system refuses is said in words."""

from __future__ import annotations

import ast
import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import reshard
from reshard.storage.paths import absolute, exists, file_size, is_here, is_link, listing, real
from tests.test_imports import MODULES

SRC = Path(__file__).parents[1] / "src"
GOLDEN = Path(__file__).parent / "golden"
# What `pathlib.Path` and `os` ask of the system or change there.
LOOKING = {
    "absolute", "cwd", "exists", "glob", "is_dir", "is_file", "is_symlink", "iterdir", "lstat",
    "read_bytes", "read_text", "readlink", "realpath", "resolve", "rglob", "samefile", "stat",
    "lexists", "listdir", "scandir", "walk", "getsize", "abspath", "getcwd",
}  # fmt: skip
CHANGING = {
    "mkdir", "makedirs", "rename", "replace", "rmdir", "symlink_to", "touch", "unlink",
    "write_bytes", "write_text",
}  # fmt: skip
#: Who does so beside `storage/`, and why.
ALLOWED = {
    "reshard.transfer.commit": "makes the output folder and gives it its name",
    "reshard.transfer.journal": "appends to its file in the output folder",
    "reshard.transfer.leftovers": "removes what it made, by inode",
    "reshard.transfer.lock": "holds a file beside the output",
    "reshard.transfer.resuming": "makes a run's own folder",
    "reshard.transfer.system": "calls that pathlib does not have, on the output",
    "reshard.cli.topics": "reads reshard's own pages",
    "reshard.transfer.cluster.keeper": "removes the folder of a cluster, and reads /proc",
    "reshard.evaluate.memory": "reads /proc",
    "reshard.transfer.memory": "reads /proc",
    "reshard.evaluate.page": "reads a template of the package",
    "reshard.evaluate.texts": "reads texts of the package",
    "reshard.watching.watch": "makes the folder of the outputs",
    "reshard.pages.page": "reads a template of the package, looks at a page's head and writes one",
    "reshard.formats.info": "reads the entry points of installed packages",
}


def _touches(node: ast.Call) -> bool:
    function = node.func
    if isinstance(function, ast.Name):
        return function.id == "open"
    if not isinstance(function, ast.Attribute):
        return False
    of = ast.unparse(function.value)
    if function.attr == "open":
        # Of `Sources` it is the door itself, of an image or a sound another library's.
        return of == "os" or bool(node.args and isinstance(node.args[0], ast.Constant))
    if function.attr == "replace" or function.attr == "walk":
        return of in ("os", "partial", "path")  # str.replace, msgspec's and ast's are others
    return function.attr in LOOKING | CHANGING or of in ("shutil", "os.path")


@pytest.mark.parametrize("module", MODULES)
def test_no_other_room_asks_the_system(module: str) -> None:
    if module.startswith(("reshard.storage", "reshard.testing")) or module in ALLOWED:
        return
    tree = ast.parse(MODULES[module].read_text("utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and _touches(node)]
    harmless = ("os.path.expanduser", "os.path.normpath", "shutil.get_terminal_size",
                "shutil.disk_usage")  # fmt: skip
    told = [f"{c.lineno}: {ast.unparse(c)}" for c in calls if ast.unparse(c.func) not in harmless]
    assert not told, f"ask reshard.storage.paths or Sources: {told}"


def test_each_exception_is_needed() -> None:
    for module in ALLOWED:
        calls = [n for n in ast.walk(ast.parse(MODULES[module].read_text("utf-8")))
                 if isinstance(n, ast.Call) and _touches(n)]  # fmt: skip
        assert calls, module


CALLS: dict[str, Callable[[Path, Path, Path], Any]] = {
    "open": lambda model, plain, out: reshard.open(model),
    "inspect": lambda model, plain, out: reshard.inspect(model, base=plain),
    "inspect, as base": lambda model, plain, out: reshard.inspect(plain, base=model),
    "convert": lambda model, plain, out: reshard.convert(model, out),
    "convert, onto": lambda model, plain, out: reshard.convert(plain, out, base=model),
    "convert, over": lambda model, plain, out: reshard.convert(plain, model, overwrite=True),
    "verify": lambda model, plain, out: reshard.verify(model),
    "verify, against": lambda model, plain, out: reshard.verify(plain, model),
    "diff": lambda model, plain, out: reshard.diff(plain, model),
    "doctor": lambda model, plain, out: reshard.doctor(model, base=plain),
    "doctor, by the base": lambda model, plain, out: reshard.doctor(plain, base=model),
}
#: A call of the system, and what it is refused for, below the model's folder.
REFUSED = {
    "the folder": ("stat", ""),
    "a file": ("stat", "model.safetensors"),
    "the list": ("listdir", ""),
    "reading": ("open", "model.safetensors"),
}


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    """Two models of the same names, as reshard writes them."""
    for name in ("model", "plain"):
        (tmp_path / f"made-{name}").mkdir()
        save_file({"w": np.ones(4, np.float32)}, tmp_path / f"made-{name}" / "model.safetensors")
        (tmp_path / f"made-{name}" / "config.json").write_text("{}")
        reshard.convert(tmp_path / f"made-{name}", tmp_path / name)
    return tmp_path / "model", tmp_path / "plain"


@pytest.mark.heavy
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("refused", REFUSED)
@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE], ids=errno.errorcode.get)
def test_what_the_system_refuses_is_said_in_words(
    models: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    number: int,
    refused: str,
    call: str,
) -> None:
    model, plain = models
    function, below = REFUSED[refused]
    asked = getattr(os, function)

    def refuse(path: Any = ".", *rest: Any, **more: Any) -> Any:
        if isinstance(path, str | Path) and str(path) == str(model / below):
            raise OSError(number, os.strerror(number), path)
        return asked(path, *rest, **more)

    monkeypatch.setattr(os, function, refuse)
    try:
        told = str(CALLS[call](model, plain, tmp_path / "out").findings)
    except reshard.ReshardError as error:
        told = str(error)
        assert str(model) in told
    except AttributeError:
        told = "no error"
    finally:
        monkeypatch.undo()
    if (call, refused) not in UNASKED:
        assert os.strerror(number) in told
    assert not (tmp_path / "out").exists()
    assert reshard.verify(model)


#: What these need not ask for.
UNASKED = {("convert, over", "reading"), ("verify", "the list")}


@pytest.mark.parametrize("call", CALLS)
def test_names_that_no_file_can_have(models: tuple[Path, Path], tmp_path: Path, call: str) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("x" * 300, "loop", "\ud800", "loop/below", "made-plain/config.json/below"):
        with pytest.raises(reshard.ReshardError):
            CALLS[call](tmp_path / name, models[1], tmp_path / "out")


def test_the_current_folder_is_gone(models: tuple[Path, Path], tmp_path: Path) -> None:
    code = (
        "import os, sys, reshard\n"
        "gone, model = sys.argv[1:]\n"
        "os.chdir(gone); os.rmdir(gone)\n"
        "for path in ('model', os.path.join('..', 'model')):\n"
        "    try:\n"
        "        reshard.open(path)\n"
        "    except reshard.ReshardError as error:\n"
        "        print(error)\n"
        "reshard.open(model).tensors['w'].numpy()\n"
        "reshard.convert(model, model + '-out')\n"
    )
    (tmp_path / "gone").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "gone", models[0]],
        env={**os.environ, "PYTHONPATH": str(SRC)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2
    assert (tmp_path / "model-out" / "model.safetensors").is_file()


def test_a_path_is_the_current_folder_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_here(Path())
    assert is_here(tmp_path)
    assert not is_here(tmp_path / "x")
    (tmp_path / "x").mkdir()
    monkeypatch.chdir(tmp_path / "x")
    (tmp_path / "x").rmdir()
    assert not is_here(tmp_path)
    for function in (real, absolute):
        with pytest.raises(reshard.NotFoundError, match="relative to the current folder"):
            function(Path("x"))


def test_links_and_what_is_absent(tmp_path: Path) -> None:
    (tmp_path / "to").symlink_to("nowhere")
    (tmp_path / "file").write_bytes(b"four")
    assert is_link(tmp_path / "to")
    assert not exists(tmp_path / "to")
    assert file_size(tmp_path / "file") == 4
    assert [path.name for path in listing(tmp_path)] == ["file", "to"]
    for path in (tmp_path / "to", tmp_path / "file" / "below"):
        with pytest.raises(reshard.NotFoundError, match="no such file"):
            file_size(path)
    shutil.rmtree(tmp_path)
    with pytest.raises(reshard.NotFoundError, match="cannot be listed: No such file"):
        listing(tmp_path)


#: Small checkpoints of every kind, each with the call that reads it.
CHECKPOINTS = [path.parent.name for path in sorted(GOLDEN.glob("*/checkpoint"))]


@pytest.mark.parametrize("function", ["stat", "listdir", "open"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_path_of_every_format(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, function: str
) -> None:
    """A path that the system refuses is an error in words or need not be asked for."""
    shutil.copytree(GOLDEN / name / "checkpoint", tmp_path / "run")
    asked, told = getattr(os, function), 0
    words = os.strerror(errno.EIO)
    for path in (tmp_path / "run", *(tmp_path / "run").rglob("*")):

        def refuse(at: Any = ".", *rest: Any, path: Path = path, **more: Any) -> Any:
            if isinstance(at, str | Path) and str(at) == str(path):
                raise OSError(errno.EIO, words, at)
            return asked(at, *rest, **more)

        with monkeypatch.context() as patch:
            patch.setattr(os, function, refuse)
            try:
                reshard.convert(tmp_path / "run", tmp_path / "out", dry_run=True)
            except reshard.ReshardError as error:
                told += words in str(error)
    assert told
