"""The command starts a cluster of this machine, and ends it, however it ends itself."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import reshard
from reshard.transfer.cluster import connection, keeper
from tests.child import until
from tests.cluster import nodes
from tests.cluster.test_ray import assert_same_folder, save
from tests.golden.table import HERE

pytest.importorskip("ray")
pytestmark = pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds processes in /proc")


@pytest.fixture
def mark() -> Iterator[str]:
    """A variable of the environment that marks the processes of one test; they are ended."""
    name = f"RESHARD_TEST_{os.getpid()}_{time.time_ns()}=1"
    yield name
    nodes.kill(marked(name))


def marked(mark: str) -> list[int]:
    """The processes that are marked so."""
    return nodes.processes("environ", mark.encode())


def used(folder: Path, mark: str) -> bool:
    """Whether processes that are marked so are those of the cluster of a folder."""
    name = f"{connection._MARK}={folder}\0".encode()
    return bool({*nodes.processes("environ", name)} & {*marked(mark)})


def start(mark: str, *arguments: str | Path) -> subprocess.Popen[str]:
    name, _, value = mark.partition("=")
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    return subprocess.Popen(
        [sys.executable, "-m", "reshard", "convert", *map(str, arguments), "--engine", "ray"],
        env={**environment, "PYTHONPATH": os.pathsep.join(sys.path), name: value},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
def test_the_command_alone(tmp_path: Path, mark: str) -> None:
    source = HERE / "zero3" / "checkpoint"
    run = start(mark, source, tmp_path / "out", "--threads", "2", "--json")
    out, err = run.communicate(timeout=120)
    assert run.returncode == 0, err
    assert json.loads(out)["verified"] is True
    until(lambda: not marked(mark), seconds=60)
    reshard.convert(source, tmp_path / "local")
    assert_same_folder(tmp_path / "out", tmp_path / "local")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "early"),
    [(signal.SIGINT, False), (signal.SIGTERM, False), (signal.SIGTERM, True)],
)
def test_a_signal_ends_everything(
    tmp_path: Path, mark: str, number: signal.Signals, early: bool
) -> None:
    """To the whole group, as a terminal sends Ctrl-C, and to the command alone; while workers
    write, and while Ray starts, which has a handler of its own."""
    source = save(tmp_path / "run", layers=256)
    out = tmp_path / "out"
    run = start(mark, source, out, "--threads", "1", "--dtype", "bfloat16")
    own = set() if early else {run.pid}
    until(lambda: set(nodes.writers(tmp_path)) - own, seconds=60)
    send = os.killpg if number == signal.SIGINT else os.kill
    send(run.pid, number)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130, err
    assert f"No output was written to {out}" in err
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["run"]
    until(lambda: not marked(mark), seconds=60)


@pytest.mark.parametrize("killed", [True, False])
def test_what_is_left_of_a_cluster_is_ended(tmp_path: Path, killed: bool) -> None:
    """Ray's agents outlive a killed program by a minute; one that ends by itself ends them."""
    folder = tmp_path / "cluster"
    (folder / "logs").mkdir(parents=True)
    asleep = [sys.executable, "-c", "import time; print(flush=True); time.sleep(20)"]
    mine, others = (
        subprocess.Popen(asleep, env={**os.environ, "A_MARK": where}, stdout=subprocess.PIPE)
        for where in (str(folder), f"{folder}2")
    )
    program = "import subprocess, sys; subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE).wait()"
    waiting = b"keeper.py\0A_MARK=" + os.fsencode(folder)
    keeping = [sys.executable, "-I", "-S", keeper.__file__, f"A_MARK={folder}"]
    with mine, others, subprocess.Popen([sys.executable, "-c", program, *keeping]) as run:
        assert mine.stdout is not None
        assert others.stdout is not None
        mine.stdout.readline()
        others.stdout.readline()
        until(lambda: {*nodes.processes("cmdline", waiting)} - {run.pid})
        if not killed:
            shutil.rmtree(folder)
        run.kill()
        until(lambda: not nodes.processes("cmdline", waiting))
        assert not folder.exists()
        assert (mine.poll() is not None) == killed
        assert others.poll() is None
        mine.kill()
        others.kill()


@pytest.mark.slow
def test_a_killed_command_takes_its_cluster_along(tmp_path: Path, mark: str) -> None:
    source = save(tmp_path / "run", layers=256)
    run = start(mark, source, tmp_path / "out", "--threads", "1", "--dtype", "bfloat16")
    until(lambda: set(nodes.writers(tmp_path)) - {run.pid}, seconds=60)
    scratch = {place for place in Path("/tmp").glob("reshard-*") if used(place, mark)}
    assert len(scratch) == 1
    nodes.kill([run.pid])
    run.communicate(timeout=60)
    until(lambda: not marked(mark), seconds=60)
    assert not any(place.exists() for place in scratch)
    assert not (tmp_path / "out").exists()
    again = start(mark, source, tmp_path / "out", "--threads", "1", "--dtype", "bfloat16", "--json")
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert "partial-output" in [finding["code"] for finding in json.loads(out)["findings"]]
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["out", "run"]
