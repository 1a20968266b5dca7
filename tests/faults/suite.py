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
# Faults of what is read; nothing stands before, and folders can exchange.
READ = [Trial("count", on="source")]
# Of calls that change nothing, which all end as one of these: the system does not say, or forbids.
_TOLD_APART = ("EIO", "EACCES")
# Calls that change nothing: a kill before one is a kill before the next one that does.
HARMLESS = frozenset((
    "stat64", "lstat64", "fstat64", "fstatat64", "statx", "statvfs64", "fstatvfs64", "access",
    "faccessat", "readlink", "readlinkat", "opendir", "fdopendir", "readdir64", "read", "readv",
    "pread64", "preadv64", "preadv64v2", "lseek64", "fcntl64",
))  # fmt: skip
# Calls that may transfer less than they are asked for.
TRANSFERS = frozenset((
    "read", "readv", "pread64", "preadv64", "preadv64v2", "write", "writev", "pwrite64",
    "pwritev64v2",
))  # fmt: skip
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

    def read(self, reads: Sequence[tuple[str, str, int]]) -> list[tuple[str, str]]:
        """How commands that read ended, and what they said: of a name in `trials.commands`, the
        n-th call of that name fails with EIO; without a call, its calls are counted."""
        found = (json.loads(line) for line in self._start({"reads": reads}))
        return [(ended, said) for ended, said in found]

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
    """A kill at every call that changes something, of every situation on these systems; every other
    is resumed."""
    for situation, names in counted.items():
        if situation.lacking not in systems:
            continue
        changing = [found for found in numbered(names) if found[0] not in HARMLESS]
        for number, (name, nth) in enumerate(changing):
            for action in actions:
                then_resume = number % 2 == 0 or situation.resumed
                yield replace(situation, action=action, call=name, nth=nth, then_resume=then_resume)


def numbered(names: Sequence[str]) -> list[tuple[str, int]]:
    """Each call with its number among those of its name, from 1.

    A folder is read by many calls, of which the first stands for all.
    """
    seen: dict[str, int] = {}
    found = []
    last = ""
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        if not name == last == "readdir64":
            found.append((name, seen[name]))
        last = name
    return found


def random_kills(count: int, seed: int) -> Iterator[Trial]:
    """Kills at random moments of a run, some of them after its end."""
    chance = random.Random(seed)
    for _ in range(count):
        situation = replace(chance.choice(SITUATIONS + RESUMED), then_resume=chance.random() < 0.5)
        yield replace(situation, action="timer", nth=chance.randrange(1_200_000))


def failures(
    counted: dict[Trial, list[str]],
    errors: Sequence[str],
    systems: Sequence[tuple[str, ...]],
    *,
    sampled: bool = False,
) -> Iterator[Trial]:
    """Each call of each situation fails with each error; reads and writes are also cut short.

    With `sampled`, of each name only the first and the last call. What a system lacks changes
    nothing in how it is read.
    """
    for situation, names in counted.items():
        if situation.lacking not in systems:
            continue
        calls = numbered(names)
        ends = dict(calls)
        for name, nth in calls:
            if name in situation.lacking or (sampled and nth not in (1, ends[name])):
                continue
            harmless = name in HARMLESS
            if harmless and situation.lacking:
                continue
            for error in errors:
                if not harmless or error in _TOLD_APART:
                    yield replace(situation, action="fail", call=name, nth=nth, error=error)
            if name in TRANSFERS:
                yield replace(situation, action="short", call=name, nth=nth)
