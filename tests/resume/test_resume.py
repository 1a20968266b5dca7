"""A killed run that is continued ends as if it had never been interrupted."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial as given
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import reshard
from reshard.transfer import commit, leftovers, system
from tests.files import contents
from tests.hints.case import golden
from tests.resume.runs import (
    beside,
    codes,
    facts,
    killed,
    model,
    small,
)

pytestmark = pytest.mark.heavy

Convert = Callable[..., reshard.Report]


@pytest.fixture(autouse=True)
def _small() -> Iterator[None]:
    with small():
        yield


def kinds(tmp_path: Path, kind: str) -> Convert:
    """A conversion of a kind; it takes the target and further options."""
    if kind in ("shards", "one file", "to dcp"):
        at = model(tmp_path / "in")
        options: dict[str, Any] = {"base": at / "base", "threads": 1}
        if kind == "shards":
            options["max_shard_size"] = 7000
        if kind == "to dcp":
            options = {"to": "dcp", "threads": 1, "max_shard_size": 9000}
        return given(reshard.convert, at / "trained", **options)
    run = golden(kind.partition(" ")[0], tmp_path / "in")
    more: dict[str, Any] = {"to": "dcp", "names": "disk"} if kind.endswith("to dcp") else {}
    return given(reshard.convert, run, threads=1, **more)


KINDS = ["shards", "one file", "to dcp", "zero2", "zero3", "zero3 to dcp", "dcp"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bytes_wherever_it_was_killed(tmp_path: Path, kind: str) -> None:
    convert, out, whole = kinds(tmp_path, kind), tmp_path / "place" / "out", tmp_path / "whole"
    out.parent.mkdir()
    expected = convert(whole, resume=True)
    assert expected.bytes_reused == 0
    reused, after = [], 0
    while killed(given(convert, out), after):
        report = convert(out, resume=True)
        assert contents(out) == contents(whole)
        assert beside(out) == []
        assert facts(report) == facts(expected)
        assert report.bytes_reused is not None
        assert "resumed" in codes(report)
        assert report.bytes_read <= expected.bytes_read
        reused.append(report.bytes_reused)
        reshard.verify(out)
        shutil.rmtree(out)
        after += 1 if after < 3 else 11
    assert max(reused) > 0
    assert reused[0] == 0


def test_each_moment_between_files(tmp_path: Path) -> None:
    """Killed before a file is sealed, as before the commit: finished files count, too."""
    convert, out, whole = kinds(tmp_path, "shards"), tmp_path / "place" / "out", tmp_path / "whole"
    out.parent.mkdir()
    expected = convert(whole)
    for method, count in (("seal", 8), ("commit", 1)):
        for after in range(count):
            assert killed(given(convert, out, overwrite=True), after, method)
            report = convert(out, resume=True, overwrite=True)
            assert contents(out) == contents(whole)
            assert beside(out) == []
            assert facts(report) == facts(expected)
            if method == "commit":
                assert report.bytes_reused == sum(
                    t.nbytes for t in reshard.open(whole).tensors.values()
                )
                assert report.bytes_read == 0


def test_killed_again_and_again(tmp_path: Path) -> None:
    """Each run adds to what those before had made."""
    convert, out, whole = kinds(tmp_path, "shards"), tmp_path / "place" / "out", tmp_path / "whole"
    out.parent.mkdir()
    convert(whole)
    runs = 0
    while killed(given(convert, out, resume=True), 19):
        runs += 1
        assert runs < 20
    assert runs > 1
    assert contents(out) == contents(whole)
    assert beside(out) == []


@pytest.mark.parametrize("threads", [1, 4])
def test_over_an_old_output(tmp_path: Path, threads: int) -> None:
    at, out, whole = model(tmp_path / "in"), tmp_path / "place" / "out", tmp_path / "whole"
    out.parent.mkdir()
    reshard.convert(at / "base", out)
    old = contents(out)
    convert = given(reshard.convert, at / "trained", base=at / "base", threads=threads)
    convert(whole)
    assert killed(given(convert, out, overwrite=True), 30)
    assert contents(out) == old
    with pytest.raises(reshard.WriteError, match="exists"):
        convert(out, resume=True)
    assert contents(out) == old
    report = convert(out, resume=True, overwrite=True)
    assert report.bytes_reused
    assert contents(out) == contents(whole)
    assert beside(out) == []


def test_a_plain_run_removes_what_was_left(tmp_path: Path) -> None:
    convert, out, whole = kinds(tmp_path, "shards"), tmp_path / "place" / "out", tmp_path / "whole"
    out.parent.mkdir()
    convert(whole)
    assert killed(given(convert, out), 20)
    report = convert(out)
    assert codes(report).count("partial-output") == 1
    assert report.bytes_reused is None
    assert contents(out) == contents(whole)
    assert beside(out) == []


def test_a_full_disk_keeps_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --resume; without, nothing is left, as before."""
    convert, out, whole = kinds(tmp_path, "shards"), tmp_path / "place" / "out", tmp_path / "whole"
    out.parent.mkdir()
    convert(whole)
    write, calls = system.write_fully, 0

    def full(fd: int, data: memoryview, offset: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 40:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(fd, data, offset)

    for resume in (False, True):
        calls = 0
        with monkeypatch.context() as patched:
            patched.setattr(commit, "write_fully", full)
            with pytest.raises(reshard.WriteError, match="No space left") as error:
                convert(out, resume=resume)
        assert ("pass --resume again" in str(error.value)) == resume
        assert len(beside(out)) == resume
        assert not out.exists()
    report = convert(out, resume=True)
    assert report.bytes_reused
    assert contents(out) == contents(whole)
    assert beside(out) == []


def test_what_is_of_no_use_is_not_kept(tmp_path: Path) -> None:
    """An error of the input or of the values: made again, it would be the same."""
    at, out = model(tmp_path / "in"), tmp_path / "place" / "out"
    out.parent.mkdir()
    with pytest.raises(reshard.VerificationError, match="nothing was trained"):
        reshard.convert(at / "base", out, base=at / "base", resume=True)
    assert beside(out) == []


def test_room_that_a_killed_run_takes_is_counted_as_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert, out = kinds(tmp_path, "shards"), tmp_path / "place" / "out"
    out.parent.mkdir()
    assert killed(given(convert, out), 30)
    taken = leftovers.reclaimable(out)
    assert taken > 10000
    needed = 36500 + 2 * 5000
    free = mock.Mock(return_value=mock.Mock(free=needed - taken + 100))
    monkeypatch.setattr(shutil, "disk_usage", free)
    with pytest.raises(reshard.WriteError, match="are free"):
        convert(out.with_name("other"), resume=True)
    assert convert(out, resume=True).bytes_reused
