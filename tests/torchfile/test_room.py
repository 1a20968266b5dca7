"""What holds for the room as a whole: nothing of a file is run, and nothing is left changed."""

from __future__ import annotations

import ast
import gc
import subprocess
import sys
from pathlib import Path

import pytest

import reshard.containers.torch
from reshard.containers.torch import read_pickle
from reshard.errors import ReshardError
from tests.torchfile.handmade import pickle

ROOM = Path(reshard.containers.torch.__file__).parent
# What could turn a name or bytes of a file into something that runs.
FORBIDDEN_MODULES = {"pickle", "_pickle", "marshal", "importlib", "shelve", "copyreg", "zipfile"}
FORBIDDEN_NAMES = {"eval", "exec", "getattr", "setattr", "__import__", "compile", "globals"}


@pytest.mark.parametrize("path", sorted(ROOM.glob("*.py")), ids=lambda path: path.name)
def test_no_module_can_look_up_or_run_a_name(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not {alias.name.partition(".")[0] for alias in node.names} & FORBIDDEN_MODULES
        if isinstance(node, ast.ImportFrom):
            assert (node.module or "").partition(".")[0] not in FORBIDDEN_MODULES
        if isinstance(node, ast.Name):
            assert node.id not in FORBIDDEN_NAMES


def test_it_needs_no_torch() -> None:
    script = "import sys, reshard.containers.torch; sys.exit('torch' in sys.modules)"
    subprocess.run(
        [sys.executable, "-c", script], check=True, env={"PYTHONPATH": str(ROOM.parents[1])}
    )


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_left_as_it_was(enabled: bool) -> None:
    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        read_pickle(pickle(b"N"), path="x")
        with pytest.raises(ReshardError):
            read_pickle(pickle(b"\xff"), path="x")
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()


def test_an_enumeration_of_deepspeed_is_its_number() -> None:
    body = b"cdeepspeed.runtime.zero.config\nZeroStageEnum\nK\2\x85R"
    assert read_pickle(pickle(body), path="x").value == 2
