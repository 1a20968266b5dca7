"""Files are synced side by side; what fails is raised, and nothing more is begun."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from reshard.transfer.commit import OutputFolder
from reshard.transfer.seals import Seals


def test_seals_run_side_by_side() -> None:
    together = threading.Barrier(8, timeout=20)

    def meet() -> None:
        together.wait()  # for all the others

    seals = Seals()
    for _ in range(8):
        seals.add(meet)
    seals.settle()
    seals.close()


def test_what_fails_is_raised_and_nothing_more_is_called() -> None:
    called = []

    def fail() -> None:
        raise OSError("disk")

    seals = Seals()
    seals.add(fail)
    with pytest.raises(OSError, match="disk"):
        seals.settle()
    with pytest.raises(OSError, match="disk"):
        seals.add(lambda: called.append(1))
    with pytest.raises(OSError, match="disk"):
        seals.settle()
    seals.close()
    assert not called


def test_few_files_are_open_at_a_time(tmp_path: Path) -> None:
    """One that writes faster than the disk syncs waits; no descriptor is left."""
    with OutputFolder(tmp_path / "out", "digest") as folder:
        most = 0
        for number in range(300):
            folder.write(f"{number % 7}/{number}", b"x" * number)
            most = max(most, len(folder._open))
        folder.commit()
        assert most <= 65
        assert not folder._open
    for number in range(300):
        assert (tmp_path / "out" / f"{number % 7}/{number}").stat().st_size == number
