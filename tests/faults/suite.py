"""The trials of the short and the long suite, and running them."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from tests.faults import library
from tests.faults.trials import Outcome, Trial, loaded

ROOT = Path(__file__).parents[2]
# Systems: of today; without an exchange of folders (NFS, many FUSE); without locks as well.
SYSTEMS: tuple[tuple[str, ...], ...] = ((), ("renameat2",), ("renameat2", "flock", "fallocate64"))
ERRORS = ("EIO", "ENOSPC", "EDQUOT", "ENOLCK", "EACCES", "EINVAL")
SITUATIONS = [
    Trial("count", overwrite=overwrite, lacking=lacking)
    for overwrite in (False, True)
    for lacking in SYSTEMS
]
# Of a run that continues one that was killed.
RESUMED = [replace(situation, resumed=True) for situation in SITUATIONS]


class Bench:
    """Runs trials in one process, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._library = library.build(folder)
        self._runs = 0

    def run(self, trials: Sequence[Trial]) -> list[Outcome]:
        """The outcome of each trial."""
        lines = self._start({"trials": [asdict(trial) for trial in trials]})
        assert len(lines) == len(trials)
        return [loaded(line) for line in lines]

    def race(self, rounds: int) -> list[list[str]]:
        """How three equal commands at once ended, and what stood then."""
        return [json.loads(line) for line in self._start({"races": rounds})]

    def _start(self, plan: object) -> list[str]:
        self._runs += 1
        folder = self._folder / str(self._runs)
        folder.mkdir()
        environment = {
            **os.environ,
            "LD_PRELOAD": str(self._library),
            "PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(ROOT), *sys.path)),
            "OPENBLAS_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        done = subprocess.run(
            [sys.executable, "-m", "tests.faults.trials", str(folder)],
            input=json.dumps(plan),
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()


def calls(
    bench: Bench, *, late: bool, situations: Sequence[Trial] = SITUATIONS
) -> dict[Trial, list[str]]:
    """The calls of each situation, in order: of the whole run, or from the commit on."""
    situations = [replace(situation, late=late) for situation in situations]
    return {
        outcome.trial: outcome.calls for outcome in bench.run(situations) if outcome.ended == "done"
    }


def kills(
    counted: dict[Trial, list[str]],
    actions: Sequence[str],
    systems: Sequence[tuple[str, ...]] = SYSTEMS,
) -> Iterator[Trial]:
    """A kill at every call of every situation on these systems; every other is resumed."""
    for situation, names in counted.items():
        if situation.lacking not in systems:
            continue
        for nth in range(1, len(names) + 1):
            for action in actions:
                then_resume = bool(nth % 2) or situation.resumed
                yield replace(situation, action=action, nth=nth, then_resume=then_resume)


def random_kills(count: int, most: float, seed: int) -> Iterator[Trial]:
    """Kills at random moments within `most` seconds."""
    chance = random.Random(seed)
    for _ in range(count):
        situation = replace(chance.choice(SITUATIONS + RESUMED), then_resume=chance.random() < 0.5)
        yield replace(situation, action="timer", nth=chance.randrange(int(most * 1e6)))


def failures(
    counted: dict[Trial, list[str]], errors: Sequence[str], systems: Sequence[tuple[str, ...]]
) -> Iterator[Trial]:
    """Each call of each situation fails with each error; writes are also cut short."""
    for situation, names in counted.items():
        if situation.lacking not in systems:
            continue
        seen: dict[str, int] = {}
        for name in names:
            nth = seen[name] = seen.get(name, 0) + 1
            if name in situation.lacking:
                continue
            for error in errors:
                yield replace(situation, action="fail", call=name, nth=nth, error=error)
            if name == "pwrite64":
                yield replace(situation, action="short", call=name, nth=nth)
