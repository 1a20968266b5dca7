"""Conversions on a real cluster of three nodes: the same bytes, whatever happens to workers."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import reshard
from reshard.cli.app import run
from reshard.conversion import execute
from reshard.conversion.options import ENGINES, DTypeChoice, Engine
from reshard.conversion.verification import verify_folder
from reshard.errors import OptionError, ReshardError, VerificationError, WriteError
from reshard.transfer.cluster import executor, tasks
from tests.cluster import nodes
from tests.golden.table import CONVERSIONS, GOLDEN, HERE, digests
from tests.hints import tiny
from tests.hints.case import golden
from tests.test_page_commands import CLUSTER
from tests.test_site import CASES, parsed

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds workers in /proc")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Three nodes, to which this process is connected, as a program that calls reshard may be."""
    with nodes.cluster(3) as made:
        ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
        yield made
        ray.shutdown()


@pytest.fixture(autouse=True)
def _small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many tasks as a large model has."""
    monkeypatch.setattr(executor, "TASK_NBYTES", 2 << 10)


def save(folder: Path, layers: int = 24, rows: int = 1024) -> Path:
    """A checkpoint of some layers; seconds of work."""
    folder.mkdir()
    random = np.random.default_rng(0)
    one = random.standard_normal((rows, 1024), np.float32)
    save_file({f"layers.{n}.weight": one + n for n in range(layers)}, folder / "model.safetensors")
    return folder


def assert_same_folder(one: Path, other: Path) -> None:
    """Every file the same, byte for byte, reshard.json among them."""
    names = sorted(path.relative_to(one) for path in one.rglob("*"))
    assert names == sorted(path.relative_to(other) for path in other.rglob("*"))
    assert Path("reshard.json") in names
    differ = [
        n for n in names if (one / n).is_file() and not filecmp.cmp(one / n, other / n, False)
    ]
    assert differ == []


def test_golden_checkpoints_give_the_same_files_as_ever(cluster: Any, tmp_path: Path) -> None:
    for name in GOLDEN:
        kept = json.loads((HERE / name / "digests.json").read_text("utf-8"))["files"]
        for what, options in CONVERSIONS.items():
            out, there = tmp_path / name / what, tmp_path / f"{name}-local" / what
            report = reshard.convert(HERE / name / "checkpoint", out, engine="ray", **options)
            assert report.verified
            assert digests(out) == kept[what]
            local = reshard.convert(HERE / name / "checkpoint", there, **options)
            assert_same_folder(out, there)
            apart = ("seconds", "target", "findings")  # one of these names the target
            assert {k: v for k, v in report.to_json().items() if k not in apart} == {
                k: v for k, v in local.to_json().items() if k not in apart
            }


def test_workers_import_what_they_need_and_tasks_are_made_when_they_are_due(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No torch, no reader of a format; and no more tasks at a time than the workers soon take."""
    source = save(tmp_path / "run", layers=32, rows=64)
    together, under_way, most = executor._together, 0, 0

    def counted(*arguments: Any) -> Iterator[Any]:
        nonlocal under_way, most
        for pieces in together(*arguments):
            under_way += 1
            most = max(most, under_way)
            yield pieces

    def answered(stage: str, done: int, total: int) -> None:
        nonlocal under_way
        under_way -= stage == "write"

    monkeypatch.setattr(executor, "_together", counted)
    reshard.convert(source, tmp_path / "out", engine="ray", progress=answered)
    assert under_way == 0
    assert most == tasks._AHEAD * 3 < 32
    ask = ray.remote(scheduling_strategy="SPREAD")(lambda: sorted(sys.modules))
    found = [modules for modules in ray.get([ask.remote() for _ in range(6)])
             if "reshard.transfer.cluster.worker" in modules]  # fmt: skip
    assert found
    unwanted = ("torch", "reshard.formats", "reshard.conversion", "reshard.containers")
    assert [name for modules in found for name in modules if name.startswith(unwanted)] == []


@pytest.mark.slow
def test_workers_that_are_lost(cluster: Any, tmp_path: Path) -> None:
    """Their pieces are made again: workers are killed at their work."""
    source = save(tmp_path / "run")
    reshard.convert(source, tmp_path / "local", dtype="bfloat16")
    seen: list[tuple[str, int, int]] = []

    def kill_workers(stage: str, done: int, total: int) -> None:
        seen.append((stage, done, total))
        if stage == "write" and len(seen) <= 4:
            nodes.kill(nodes.at_work())

    out = tmp_path / "out"
    report = reshard.convert(source, out, dtype="bfloat16", engine="ray", progress=kill_workers)
    assert "pieces-made-again" in [finding.code for finding in report.findings]
    assert_same_folder(out, tmp_path / "local")
    for stage in ("write", "verify"):
        done = [done for what, done, _ in seen if what == stage]
        assert done == sorted(done)
        assert done[-1] == max(total for what, _, total in seen if what == stage)


@pytest.mark.slow
def test_a_node_that_is_lost(cluster: Any, tmp_path: Path) -> None:
    """A whole node, its workers and what it had before it, killed in the middle."""
    source = save(tmp_path / "run")
    reshard.convert(source, tmp_path / "local", dtype="bfloat16")
    lost = cluster.add_node(num_cpus=2, object_store_memory=nodes.STORE)
    cluster.wait_for_nodes()

    def kill_node(stage: str, done: int, total: int) -> None:
        if lost in cluster.worker_nodes and done >= total // 4:
            cluster.remove_node(lost, allow_graceful=False)

    out = tmp_path / "again"
    reshard.convert(source, out, dtype="bfloat16", engine="ray", progress=kill_node)
    assert lost not in cluster.worker_nodes
    assert_same_folder(out, tmp_path / "local")


def test_an_error_of_a_worker_is_the_error_of_the_command(cluster: Any, tmp_path: Path) -> None:
    """The same class, words, path and tensor as from a thread."""
    large = save(tmp_path / "large", layers=4)
    tensors = {"w": np.array([1.0, 1e30], np.float32), "v": np.zeros(2048, np.float32)}
    save_file(tensors, large / "model.safetensors")
    copy = golden("zero3", tmp_path / "damaged")
    file = next(copy.rglob("*rank_0*optim_states.pt"))
    catalog = reshard.open(copy)
    extent = next(
        f.in_file for e in catalog.tensors.values() for f in e.entry.fragments
        if f.in_file.file.path == str(file)
    )  # fmt: skip
    raw = bytearray(file.read_bytes())
    raw[extent.offset] ^= 1
    file.write_bytes(raw)
    cases: tuple[tuple[Path, DTypeChoice], ...] = ((large, "float16"), (copy, "keep"))
    for source, dtype in cases:
        errors = []
        for engine in ENGINES:
            with pytest.raises(ReshardError) as caught:
                reshard.convert(source, tmp_path / "out", dtype=dtype, engine=engine)
            errors.append(caught.value)
            assert not [p for p in tmp_path.iterdir() if "out" in p.name and p.is_dir()]
        fields = [(type(e), e.message, e.path, e.tensor, e.hint) for e in errors]
        assert fields[0] == fields[1]


def test_a_source_that_changes(cluster: Any, tmp_path: Path) -> None:
    source = save(tmp_path / "run")

    def touch(stage: str, done: int, total: int) -> None:
        os.utime(source / "model.safetensors", ns=(1, done))

    with pytest.raises(ReshardError, match=r"changed|not the one"):
        reshard.convert(source, tmp_path / "out", engine="ray", progress=touch)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["run"]


def test_the_workers_read_the_output_again(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save(tmp_path / "run", layers=4)

    def flipped(folder: Path, **more: Any) -> Any:
        with (folder / "model.safetensors").open("r+b") as file:
            file.seek(-1000, os.SEEK_END)
            file.write(b"\x55")
        return verify_folder(folder, **more)

    monkeypatch.setattr(execute, "verify_folder", flipped)
    monkeypatch.setattr("reshard.transfer.executor.leaf_digest", None)  # of this process
    with pytest.raises(VerificationError, match="has changed since it was written") as caught:
        reshard.convert(source, tmp_path / "out", engine="ray")
    assert caught.value.tensor == "layers.3.weight"
    assert not (tmp_path / "out").exists()


def test_an_interrupt_ends_the_workers(cluster: Any, tmp_path: Path) -> None:
    source = save(tmp_path / "run", layers=64)
    out = tmp_path / "out"
    sent: list[int] = []

    def interrupt(stage: str, done: int, total: int) -> None:
        if not sent:
            sent.append(done)
            threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGINT)).start()

    with pytest.raises(KeyboardInterrupt):
        reshard.convert(source, out, dtype="bfloat16", engine="ray", progress=interrupt)
    assert nodes.writers(tmp_path) == []
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["run"]


@pytest.mark.parametrize("first", ENGINES)
@pytest.mark.parametrize("second", ENGINES)
def test_an_interrupted_run_is_continued(
    cluster: Any, tmp_path: Path, first: Engine, second: Engine
) -> None:
    """By either engine, whichever was interrupted; pieces that were damaged are made again."""
    if first == second == "local":
        return  # tests/resume
    source = save(tmp_path / "run")
    out = tmp_path / "out"

    def interrupt(stage: str, done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reshard.convert(
            source, out, dtype="bfloat16", engine=first, resume=True, progress=interrupt
        )
    (left,) = tmp_path.glob(".out.partial-*/tmp/*")
    with left.open("r+b") as file:
        file.seek(5 << 20)
        file.write(b"damage")
    report = reshard.convert(source, out, dtype="bfloat16", engine=second, resume=True)
    assert "resumed" in [finding.code for finding in report.findings]
    total = left.stat().st_size if left.exists() else (out / "model.safetensors").stat().st_size
    assert report.bytes_reused is not None
    assert total // 3 < report.bytes_reused < total
    reshard.convert(source, tmp_path / "local", dtype="bfloat16")
    assert_same_folder(out, tmp_path / "local")


@pytest.mark.slow
def test_a_task_that_ends_its_workers(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is given up in the end, and a run of fewer tasks at a time is what is advised."""
    source = save(tmp_path / "run", layers=8)
    monkeypatch.setattr(tasks, "_TRIES", 1)
    stop = threading.Event()

    def end_workers() -> None:
        while not stop.wait(0.01):
            nodes.kill(nodes.at_work())

    killer = threading.Thread(target=end_workers)
    killer.start()
    try:
        with pytest.raises(WriteError, match="were lost") as caught:
            reshard.convert(source, tmp_path / "out", engine="ray")
    finally:
        stop.set()
        killer.join()
    assert "--threads N" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["run"]
    monkeypatch.undo()
    assert reshard.convert(source, tmp_path / "out", engine="ray", threads=1).verified


def test_addresses(cluster: Any, tmp_path: Path) -> None:
    """A program that is connected uses its own cluster, and names no other."""
    source = save(tmp_path / "run", layers=1)
    with pytest.raises(OptionError, match="connected to the cluster at"):
        reshard.convert(source, tmp_path / "out", engine="ray", ray_address="192.0.2.1:6379")
    for number, address in enumerate((None, "auto", cluster.address)):
        out = tmp_path / str(number)
        assert reshard.convert(source, out, engine="ray", ray_address=address).verified


def test_the_commands_of_the_pages(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the documentation has run on a cluster, on one."""
    monkeypatch.chdir(tmp_path)
    tiny.model(tmp_path / "MODEL")
    tiny.zero(tmp_path / "RUN")
    lines = [line for _, line in CASES if CLUSTER in line]
    assert len(lines) > 2
    for line in lines:
        found, given = parsed(line)
        assert found is not None
        assert run(found, given) == 0, line
        shutil.rmtree(tmp_path / "OUT")
