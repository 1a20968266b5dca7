"""Hand tasks to the workers of a cluster, and take what they answer.

A few more tasks than the cluster has processors are under way at a time; the others are not made
yet, so memory does not grow with their number. A task whose worker or node is lost is handed out
again. When anything fails, or the run is interrupted, the tasks under way get some seconds to end
and are then cancelled, and what follows waits until no worker works any more.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from msgspec import Struct

from reshard import errors
from reshard._version import __version__
from reshard.errors import ReshardError, UnsupportedError, WriteError
from reshard.storage import requests
from reshard.transfer.cluster import wire
from reshard.transfer.cluster.connection import Workers
from reshard.transfer.cluster.worker import work
from reshard.transfer.signals import held_signals

# Tasks under way for each processor: a worker that ends one finds the next at its node.
_AHEAD = 2
_LEAST = 4
# Times that a task is handed out before it is given up: it may be what ends its workers.
_TRIES = 5
# Seconds between two looks at how many processors the cluster has: clusters grow and shrink.
_LOOK = 5.0
# Seconds that tasks under way get before they are cancelled. Ray ends the driver without a word if
# a task is cancelled whose answer it is just taking ("Tried to complete task that was not
# pending"), so tasks that end soon are not cancelled.
_GRACE = 5.0
# Seconds that cancelled tasks get to end by themselves, and after that by force.
_PATIENCE = 30.0

Job = TypeVar("Job")
Answered = TypeVar("Answered", bound=wire.Done)


class _UnderWay(Struct, Generic[Job]):
    """A task that is handed out: for the `tries`-th time."""

    job: Job
    task: bytes
    tries: int = 1


class Tasks(Generic[Answered]):
    """Runs tasks whose answers are of type `kind`; `lost` counts those that were handed out
    again."""

    def __init__(self, ray: Any, workers: Workers, kind: type[Answered]) -> None:
        self.lost: int = 0
        self._kind = kind
        self._ray = ray
        self._most = workers.most
        self._remote = ray.remote(num_cpus=1, max_retries=0, scheduling_strategy="SPREAD")(work)
        self._processors = 0
        self._looked = float("-inf")

    def run(
        self,
        jobs: Iterator[tuple[Job, bytes]],
        answered: Callable[[Job, Answered], None],
    ) -> None:
        """Run every task and hand on its answer. Raises the `ReshardError` of one that fails."""
        under_way: dict[Any, _UnderWay[Job]] = {}
        again: deque[_UnderWay[Job]] = deque()
        try:
            while True:
                self._hand_out(jobs, under_way, again)
                if not under_way:
                    return
                for ref in self._finished(under_way):
                    answer = self._answer(ref)
                    with held_signals():
                        task = under_way.pop(ref)
                    if isinstance(answer, self._kind):
                        requests.add(answer.asked)
                        answered(task.job, answer)
                    elif isinstance(answer, Exception):
                        again.append(self._again(task, answer))
                    else:
                        raise _failed(answer)
        except BaseException:
            self._end(list(under_way))
            raise

    def _hand_out(
        self,
        jobs: Iterator[tuple[Job, bytes]],
        under_way: dict[Any, _UnderWay[Job]],
        again: deque[_UnderWay[Job]],
    ) -> None:
        """Hand out tasks until enough are under way."""
        while len(under_way) < self._room():
            if again:
                task = again.popleft()
            else:
                following = next(jobs, None)
                if following is None:
                    return
                task = _UnderWay(*following)
            with held_signals():  # what is handed out and not noted could not be cancelled
                under_way[self._remote.remote(__version__, task.task)] = task

    def _room(self) -> int:
        """How many tasks may be under way."""
        now = time.monotonic()
        if now - self._looked >= _LOOK:
            self._looked = now
            self._processors = int(self._ray.cluster_resources().get("CPU", 0))
        return self._most or max(_LEAST, _AHEAD * self._processors)

    def _finished(self, under_way: dict[Any, _UnderWay[Job]]) -> list[Any]:
        """Wait until some tasks are finished."""
        refs = list(under_way)
        first, _ = self._ray.wait(refs, num_returns=1, timeout=_LOOK, fetch_local=False)
        if not first:
            return []
        ready, _ = self._ray.wait(refs, num_returns=len(refs), timeout=0, fetch_local=False)
        return list(ready) or list(first)

    def _answer(self, ref: Any) -> wire.Answer | Exception:
        """What a task answered, or how its worker was lost. Raises what else went wrong."""
        known = self._ray.exceptions
        lost = (
            known.WorkerCrashedError,
            known.NodeDiedError,
            known.OutOfMemoryError,
            known.ObjectLostError,
        )
        try:
            return wire.decode_answer(self._ray.get(ref))
        except lost as error:
            return RuntimeError(_line(error))
        except known.RayTaskError as error:
            if "No module named 'reshard" in str(error):
                raise UnsupportedError(
                    "a node of the cluster does not have reshard.",
                    hint=f"Install reshard {__version__} on every node.",
                ) from None
            raise error.as_instanceof_cause() from None
        except known.RayError as error:
            raise WriteError(
                f"the Ray cluster was lost: {_line(error)}", hint="Convert again."
            ) from None

    def _again(self, task: _UnderWay[Job], lost: Exception) -> _UnderWay[Job]:
        """The task of a lost worker, for another one."""
        if task.tries >= _TRIES:
            raise WriteError(
                f"the workers of one task were lost {task.tries} times, the last one so: "
                f"{_line(lost)}",
                hint="If its nodes lack memory, run fewer pieces at a time: --threads N.",
            )
        self.lost += 1
        return _UnderWay(task.job, task.task, task.tries + 1)

    def _end(self, refs: list[Any]) -> None:
        """Wait until no worker works on one of these tasks; cancel those that do not end soon."""
        refs = self._unfinished(refs, _GRACE)
        for force in (False, True):
            for ref in refs:
                self._ray.cancel(ref, force=force)
            refs = self._unfinished(refs, _PATIENCE)

    def _unfinished(self, refs: list[Any], seconds: float) -> list[Any]:
        """Those of some tasks that are not finished within so many seconds."""
        if not refs:
            return []
        _, left = self._ray.wait(refs, num_returns=len(refs), timeout=seconds, fetch_local=False)
        return list(left)


def _failed(failure: wire.Answer) -> ReshardError:
    """The error that a worker met."""
    if not isinstance(failure, wire.Failure):
        raise TypeError(f"a worker answered another question: {type(failure).__name__}")
    kind: type[ReshardError] = getattr(errors, failure.kind)
    return kind(failure.message, path=failure.path, tensor=failure.tensor, hint=failure.hint)


def _line(error: Exception) -> str:
    """An error's first line."""
    return str(error).strip().split("\n")[0]
