"""Hostile and damaged files are refused, each with its own plain error, soon and cheaply."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import reshard
from reshard.containers.torch import Opaque, TensorRef, read_pickle
from reshard.errors import ReshardError, UnsupportedError
from tests.torchfile import hostile
from tests.torchfile.handmade import Member, archive, number, pickle, text, torch_file
from tests.torchfile.hostile import FILES, PICKLES, Case
from tests.torchfile.support import read_bytes, value_of

# Of processor time.
SECONDS = 5.0
# Of memory above the start's, in a process of its own.
MEGABYTES = 300


def refused(case: Case, error: ReshardError) -> None:
    assert isinstance(error, case.error)
    assert case.words in str(error)
    # One plain line, whatever the file says.
    assert str(error).isprintable()
    assert len(str(error)) < 1000


@pytest.mark.parametrize("case", FILES, ids=lambda case: case.name)
def test_a_file_is_refused(tmp_path: Path, case: Case) -> None:
    content = case.make()
    start = time.process_time()
    with pytest.raises(ReshardError) as caught:
        read_bytes(tmp_path / "x.pt", content)
    assert time.process_time() - start < SECONDS
    refused(case, caught.value)
    assert caught.value.path == str(tmp_path / "x.pt")


@pytest.mark.heavy
@pytest.mark.parametrize("case", PICKLES, ids=lambda case: case.name)
def test_a_bare_pickle_is_refused(case: Case) -> None:
    content = case.make()
    start = time.process_time()
    with pytest.raises(ReshardError) as caught:
        read_pickle(content, path=".metadata")
    assert time.process_time() - start < SECONDS
    refused(case, caught.value)
    assert caught.value.path == ".metadata"


@pytest.mark.heavy
@pytest.mark.parametrize("case", PICKLES, ids=lambda case: case.name)
def test_a_pickle_in_an_archive_is_refused(tmp_path: Path, case: Case) -> None:
    content = archive(Member("x/data.pkl", case.make()))
    with pytest.raises(ReshardError) as caught:
        read_bytes(tmp_path / "x.pt", content)
    refused(case, caught.value)


BOMBS = (
    "many values", "many dicts", "many tensors", "copied bytes", "all pairs of names",
    "many sizes", "many devices", "many nested names",
)  # fmt: skip


@pytest.mark.heavy
@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_takes_little_memory(tmp_path: Path, name: str) -> None:
    content = next(case.make() for case in FILES + PICKLES if case.name == name)
    path = tmp_path / "x.pt"
    bare = not content.startswith(b"PK")
    path.write_bytes(archive(Member("x/data.pkl", content)) if bare else content)
    script = f"""
import resource
from reshard.errors import ReshardError
from reshard.storage.local import Sources
from reshard.containers.torch import read
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    with Sources() as sources:
        read(sources.open({str(path)!r}))
except ReshardError:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(reshard.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True
    )
    assert int(done.stdout) / 1024 < MEGABYTES


@pytest.mark.parametrize("payload", [hostile.RUN, hostile.EVAL], ids=["system", "eval"])
def test_a_payload_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, payload: bytes
) -> None:
    monkeypatch.chdir(tmp_path)
    bare: Any = read_pickle(pickle(payload), path="x").value
    zipped = value_of(tmp_path / "x.pt", torch_file(payload))
    for value in (bare, zipped):
        assert isinstance(value, Opaque)
        assert value.name in ("os.system", "builtins.eval")
        assert hostile.MARKER in value.args[0]  # type: ignore[operator]
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


def test_the_payloads_would_run(tmp_path: Path) -> None:
    """The files above are live ammunition: Python's own unpickler runs them."""
    script = "import pickle, sys; pickle.loads(sys.stdin.buffer.read())"
    for payload in (hostile.RUN, hostile.EVAL):
        subprocess.run(
            [sys.executable, "-c", script],
            input=pickle(payload),
            cwd=tmp_path,
            check=True,
        )
        (tmp_path / hostile.MARKER).unlink()


def test_the_hand_made_files_are_good_when_nothing_is_changed(tmp_path: Path) -> None:
    """So each case is refused for what was changed, not for how it was made."""
    for content in (hostile.GOOD, hostile.OLD_GOOD):
        value = value_of(tmp_path / "x.pt", content)
        assert isinstance(value, TensorRef)
        assert value.shape == (4,)
        assert value.extent.nbytes == 16


def test_shared_lists_are_read_while_they_stand_for_few_values() -> None:
    """2^100 values of a pickle of a kilobyte would keep whoever walks them busy for ever."""
    value: Any = read_pickle(hostile.doubling(15), path="x").value
    assert value[14][0] is value[14][1] is value[13]
    with pytest.raises(UnsupportedError, match="repeats its parts over and over"):
        read_pickle(hostile.doubling(100), path="x")


def test_a_list_that_records_share_counts_in_each() -> None:
    """Also in what an object was called with, and what became its attributes."""
    listed = b"](" + b"N" * 100_000 + b"eq\0"
    for recalled in (b"h\0\x85R", b")\x81h\0b", b")\x81}" + text("a") + b"h\0sb"):
        records = b"](" + (b"cm\nC\n" + recalled) * 30 + b"e"
        with pytest.raises(UnsupportedError, match="stands for more than"):
            read_pickle(pickle(b"](" + listed + records + b"e"), path="x")
        few = b"](" + (b"cm\nC\n" + recalled) * 5 + b"e"
        assert read_pickle(pickle(b"](" + listed + few + b"e"), path="x").value


def test_a_mesh_of_many_ranks_is_shared_by_many_tensors() -> None:
    """Its reader keeps it, so it counts once: DTensors of 65,536 ranks recall it each."""
    ranks = b"(" + b"".join(map(number, range(65_536))) + b"t"
    mesh = (
        b"ctorch.distributed.device_mesh\nDeviceMesh\n)\x81}" + text("_rank_map") + ranks + b"sbq\0"
    )
    tensors = b"](" + (b"cm\nDTensor\n)\x81h\0b") * 1000 + b"e"
    assert read_pickle(pickle(b"](" + mesh + tensors + b"e"), path="x").value


def test_a_record_of_a_record_called() -> None:
    """What protocol 2 makes of keyword arguments: functools.partial(...)()."""
    body = b"cfunctools\npartial\ncm\nC\n\x85R)R"
    value: Any = read_pickle(pickle(body), path="x").value
    assert value.name == "functools.partial"
    assert value.args[0].args[0].name == "m.C"
