"""What becomes of the tasks under way when a run fails: Ray aborts if one is cancelled as it ends.

By a clock of its own, and by Ray itself.
"""

from __future__ import annotations

from itertools import count, repeat
from types import SimpleNamespace
from typing import Any

import pytest

from reshard.transfer.cluster import wire
from reshard.transfer.cluster.connection import Workers
from reshard.transfer.cluster.tasks import Tasks
from tests import child

ray = pytest.importorskip("ray")
NEVER = float("inf")


class Clock:
    """Ray, as far as `Tasks` uses it: task number n ends at `ends[n]`, or where it is cancelled,
    which a task that is in `stubborn` notices by force alone."""

    exceptions = ray.exceptions

    def __init__(self, ends: list[float], stubborn: tuple[int, ...] = ()) -> None:
        self.now = 0.0
        self.cancelled: list[tuple[int, bool]] = []
        self._ends, self._stubborn = ends, stubborn

    def remote(self, **options: Any) -> Any:
        numbers = count()
        return lambda work: SimpleNamespace(remote=lambda *arguments: next(numbers))

    def cluster_resources(self) -> dict[str, float]:
        return {}

    def wait(
        self, refs: list[int], *, num_returns: int, timeout: float, fetch_local: bool
    ) -> tuple[list[int], list[int]]:
        enough = sorted(self._ends[ref] for ref in refs)[num_returns - 1]
        self.now = max(self.now, min(enough, self.now + timeout))
        ready = [ref for ref in refs if self._ends[ref] <= self.now]
        return ready, [ref for ref in refs if ref not in ready]

    def get(self, ref: int) -> bytes:
        return wire.encode(wire.HashAnswer(()))

    def cancel(self, ref: int, *, force: bool) -> None:
        self.cancelled.append((ref, force))
        if force or ref not in self._stubborn:
            self._ends[ref] = self.now


class StopError(Exception):
    """What a run fails with."""


@pytest.mark.parametrize(
    ("ends", "stubborn", "cancelled", "now"),
    [
        ([1.0, 1.0, 1.5, 5.5], (), [], 5.5),
        ([1.0, 1.0, 2.0, 9.0], (), [(3, False)], 6.0),
        ([1.0, 2.0, NEVER, NEVER], (2,), [(2, False), (3, False), (2, True)], 36.0),
    ],
)
def test_tasks_that_do_not_end_soon_are_cancelled(
    ends: list[float], stubborn: tuple[int, ...], cancelled: list[tuple[int, bool]], now: float
) -> None:
    clock = Clock(ends, stubborn)

    def fail(job: None, answer: wire.HashAnswer) -> None:
        raise StopError

    with pytest.raises(StopError):
        Tasks(clock, Workers(most=len(ends)), wire.HashAnswer).run(repeat((None, b"")), fail)
    assert clock.cancelled == cancelled
    assert clock.now == now


@pytest.mark.slow
def test_a_failure_while_other_tasks_end_does_not_end_the_program() -> None:
    child.run("tests.cluster.stopping", "60")
