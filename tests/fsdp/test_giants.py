"""Checkpoints laid out as those of a trillion parameters are, of the same shapes and fewer layers:
what is read of them, and how often."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import reshard
from benchmarks import giants
from benchmarks.giants import FILLED, Size
from tests.giants import check_one_shard

pytestmark = pytest.mark.heavy

SIZE = Size(layers=1, experts=16, world=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("giants") / "dcp"
    giants.make_dcp(made, SIZE)
    return made


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each data file is read."""
    counts: Counter[str] = Counter()
    pread, preadv = os.pread, os.preadv

    def name(fd: int) -> str:
        return Path(f"/proc/self/fd/{fd}").readlink().suffix

    def counted(fd: int, nbytes: int, offset: int) -> bytes:
        counts[name(fd)] += 1
        return pread(fd, nbytes, offset)

    def counted_into(fd: int, buffers: Any, offset: int) -> int:
        counts[name(fd)] += 1
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "pread", counted)
    monkeypatch.setattr(os, "preadv", counted_into)
    return counts


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc")


@needs_proc
def test_inspect_reads_no_item(folder: Path, reads: Counter[str]) -> None:
    found = reshard.inspect(folder)
    assert found.num_tensors == sum(1 for _ in giants.tensors(SIZE))
    assert found.bytes_to_read == found.total_bytes
    assert not reads[".distcp"]


@needs_proc
def test_opening_reads_each_item_once(folder: Path, reads: Counter[str]) -> None:
    chunks = sum(
        len(range(0, shape[0], -(-shape[0] // parts)))
        for _, shape, parts, _ in giants.tensors(SIZE)
    )
    opened = reshard.open(folder)
    assert len(opened.catalog.records) == chunks
    assert reads[".distcp"] < 1.3 * chunks  # the first of each file takes two


def test_a_tensor_of_a_summary_is_read_from_its_place(folder: Path) -> None:
    tensors = reshard.inspect(folder).checkpoint.tensors
    name = f"{FILLED}gate_proj.weight"
    values = tensors[name].numpy().astype(np.float32)
    assert np.array_equal(values, giants.values_of(name, tensors[name].shape).float().numpy())


def test_a_file_that_is_missing_or_short_is_refused_by_the_summary(
    folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "c", copy_function=os.link)
    short = tmp_path / "c" / "__3_0.distcp"
    short.unlink()
    with pytest.raises(reshard.IncompleteError, match="it is missing"):
        reshard.inspect(tmp_path / "c")
    short.write_bytes(b"PK\3\4" * 9)
    with pytest.raises(reshard.IncompleteError, match="the file has 36"):
        reshard.inspect(tmp_path / "c")


def test_a_dry_run_without_room_is_a_plan_and_a_finding(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    report = reshard.convert(folder, tmp_path / "out", dry_run=True)
    (found,) = (finding for finding in report.findings if finding.code == "no-space")
    assert f"{report.bytes_written:,} bytes are needed, but only 1,000 are free" in found.message
    with pytest.raises(reshard.WriteError, match="are free"):
        reshard.convert(folder, tmp_path / "out")
    with pytest.raises(reshard.PlanError, match="no-space"):
        reshard.convert(folder, tmp_path / "out", dry_run=True, strict=["no-space"])


def test_one_shard_of_it_converts(folder: Path, tmp_path: Path) -> None:
    """A worker needs the plan alone to make any one file of the output."""
    check_one_shard(folder, tmp_path / "out")
