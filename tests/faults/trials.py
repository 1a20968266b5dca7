"""Forks runs of one small conversion, each with its fault, and prints what happened as JSON lines.

Started with the library of faults preloaded: `python -m tests.faults.trials FOLDER PLAN`, where
PLAN is a JSON list of trials. Each trial begins with nothing or an old output under the name; after
the run with the fault comes an ordinary run of the same command, which must mend what was left.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import random
import shutil
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

import reshard
from reshard.transfer import journal
from reshard.transfer.commit import OutputFolder
from tests.faults.library import COUNT, FAIL, FAIL_ALWAYS, KILL_AFTER, KILL_BEFORE, SHORT, Faults
from tests.files import contents

# Of an error that is not one of reshard's: its last frames.
_FRAMES = 6
ACTIONS = {"fail": FAIL, "kill before": KILL_BEFORE, "kill after": KILL_AFTER, "short": SHORT}
# What a system lacks, and what it answers there.
LACKING = {"renameat2": errno.EINVAL, "flock": errno.ENOLCK, "fallocate64": errno.EOPNOTSUPP}


@dataclass(frozen=True)
class Trial:
    """A run with a fault at the n-th call of that name (`*`: any) on the output's paths.

    `action` "timer" kills after `nth` millionths of the time that an ordinary run takes, "count"
    only counts the calls. `call` may also be on the source's paths, where `on` is "source". Calls
    count from `OutputFolder.commit` on where `late`, else from the beginning. With `resumed` the
    run continues one that was killed before its commit; with `then_resume` the next run is one
    with --resume.
    """

    action: str
    call: str = "*"
    nth: int = 1
    error: str = ""
    overwrite: bool = False
    lacking: tuple[str, ...] = ()
    late: bool = False
    on: str = "output"
    resumed: bool = False
    then_resume: bool = False


@dataclass(frozen=True)
class Outcome:
    """What happened: `ended` is "done", "killed" or "error"; `stands` what the output's name has.

    `left` are the names beside the output. `kept` says whether a plain run, without --overwrite,
    found and kept the old output; `rerun` whether a run with --overwrite then succeeded and left
    the new output alone; `reused` how many bytes that run reused.
    """

    trial: Trial
    ended: str
    message: str
    stands: str
    left: list[str]
    kept: bool
    rerun: str
    calls: list[str] = field(default_factory=list)
    reused: int = 0


class Stage:
    """A folder with a model, an old output, and the place where outputs appear."""

    def __init__(self, folder: Path) -> None:
        self.model = folder / "model"
        self.place = folder / "place"
        self.out = self.place / "out"
        self._kept = folder / "old"
        journal._STEP = 1  # each piece is noted at once
        self._make_model()
        reshard.convert(self.model, self._kept, base=self.model, allow_unchanged=True)
        self.states = {"old": contents(self._kept)}
        self.place.mkdir()
        self.convert(overwrite=False)
        self.states["new"] = contents(self.out)
        self.source = contents(self.model)
        #: The seconds of an ordinary run in a fork.
        self.seconds = statistics.median(self._timed() for _ in range(5))

    def _make_model(self) -> None:
        (self.model / "chat").mkdir(parents=True)
        (self.model / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
        (self.model / "chat" / "plain.jinja").write_text("{{ x }}", encoding="utf-8")
        tensors = {"w": np.arange(300, dtype=np.float32), "b": np.ones(7, np.int64)}
        save_file(tensors, self.model / "model.safetensors")

    def convert(self, *, overwrite: bool, resume: bool = False) -> int:
        """The command that is tried; the bytes that it reused."""
        report = reshard.convert(
            self.model,
            self.out,
            base=self.model,
            dtype="float16",
            allow_unchanged=True,
            overwrite=overwrite,
            resume=resume,
            threads=1,
        )
        return report.bytes_reused or 0

    def _timed(self) -> float:
        """The seconds of a run that replaces the old output."""
        self.reset(overwrite=True)
        begun = time.perf_counter()
        ended, _ = in_child(lambda: str(self.convert(overwrite=True)))
        assert ended == "done"
        return time.perf_counter() - begun

    def leave_unfinished(self, *, overwrite: bool) -> None:
        """A run that is killed before its commit."""

        def die(folder: OutputFolder) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        def work() -> str:
            OutputFolder.commit = die  # type: ignore[method-assign, assignment]
            return str(self.convert(overwrite=overwrite))

        ended, _ = in_child(work)
        assert ended == "killed"

    def reset(self, *, overwrite: bool) -> None:
        shutil.rmtree(self.place)
        self.place.mkdir()
        if overwrite:  # inodes and times as the old output's own: it counts as reshard's
            shutil.copytree(self._kept, self.out)

    def stands(self) -> str:
        """What the output's name has: "old", "new", "nothing", or "torn" for anything else."""
        if not os.path.lexists(self.out):
            return "nothing"
        found = contents(self.out)
        return next((name for name, files in self.states.items() if files == found), "torn")

    def left(self) -> list[str]:
        return sorted(path.name for path in self.place.iterdir() if path.name != "out")


def in_child(work: Callable[[], str], kill_after: float | None = None) -> tuple[str, str]:
    """Run `work` in a fork: how it ended, and what it returned or raised."""
    receiving, sending = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(receiving)
        ended = "done"
        try:
            text = work()
        except reshard.ReshardError as error:
            ended, text = "error", str(error)
        except BaseException as error:
            ended, text = "crashed", "".join(traceback.format_exception(error)[-_FRAMES:])
        os.write(sending, json.dumps([ended, text]).encode())
        os._exit(0)
    os.close(sending)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    said = b""
    while piece := os.read(receiving, 1 << 16):
        said += piece
    os.close(receiving)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status) or not said:
        return "killed", ""
    ended, text = json.loads(said)
    return ended, text


def perform(stage: Stage, faults: Faults, trial: Trial) -> Outcome:
    """One trial."""
    stage.reset(overwrite=trial.overwrite)
    if trial.resumed:
        stage.leave_unfinished(overwrite=trial.overwrite)
    where = str(stage.place if trial.on == "output" else stage.model)

    def work() -> str:
        for call in trial.lacking:
            faults.add(call, where, 1, FAIL_ALWAYS, LACKING[call])
        added = -1

        def arm() -> None:
            nonlocal added
            action = ACTIONS.get(trial.action, COUNT)
            if trial.action != "timer":
                code = getattr(errno, trial.error) if trial.error else 0
                added = faults.add(trial.call, where, trial.nth, action, code)

        commit = OutputFolder.commit

        def late(folder: OutputFolder) -> None:
            arm()
            commit(folder)

        if trial.late:
            OutputFolder.commit = late  # type: ignore[method-assign, assignment]
        else:
            arm()
        stage.convert(overwrite=trial.overwrite, resume=trial.resumed)
        return json.dumps(faults.seen(added)) if trial.action == "count" else ""

    after = trial.nth / 1e6 * stage.seconds if trial.action == "timer" else None
    ended, message = in_child(work, after)
    calls = json.loads(message) if ended == "done" and message else []
    stands, left = stage.stands(), stage.left()
    kept = stands != "nothing" or not trial.overwrite or keeps(stage)
    rerun, why = in_child(lambda: again(stage, resume=trial.then_resume))
    assert contents(stage.model) == stage.source, "the source was changed"
    return Outcome(
        trial,
        ended,
        "" if calls else message,
        stands,
        left,
        kept,
        rerun if rerun == "done" else f"{rerun}: {why}",
        calls,
        int(why) if rerun == "done" else 0,
    )


def keeps(stage: Stage) -> bool:
    """Whether a run without --overwrite puts the old output back and refuses to replace it."""

    def plain() -> str:
        stage.convert(overwrite=False)
        return ""

    ended, _ = in_child(plain)
    return ended == "error" and stage.stands() == "old"


def again(stage: Stage, *, resume: bool) -> str:
    """The same command, without a fault: it must end well and leave nothing else. The bytes that it
    reused."""
    reused = stage.convert(overwrite=True, resume=resume)
    stands, left = stage.stands(), stage.left()
    if stands != "new" or left:
        raise RuntimeError(f"{stands}, beside it {left}")
    return str(reused)


def race(stage: Stage, runners: int, rounds: int) -> Iterator[list[str]]:
    """Several runs of one command at once: how each ended, and last what stands beside what."""
    for number in range(rounds):
        stage.reset(overwrite=number % 2 == 1)
        pids = []
        for _ in range(runners):
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    time.sleep(random.random() * 0.01)
                    stage.convert(overwrite=True)
                    code = 0
                except reshard.WriteError:
                    code = 3
                finally:
                    os._exit(code)
            pids.append(pid)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        ended = [{0: "done", 3: "refused"}.get(code, f"exit {code}") for code in codes]
        yield [*sorted(ended), stage.stands(), *stage.left()]


def commands(stage: Stage) -> dict[str, Callable[[], object]]:
    """What reads a checkpoint or an output, by a name."""
    out, model = stage.out, stage.model
    return {
        "verify": lambda: reshard.verify(out),
        "verify against": lambda: reshard.verify(out, against=model, base=model),
        "inspect": lambda: reshard.inspect(model, optimizer=True),
        "diff": lambda: reshard.diff(out, model),
        "doctor": lambda: reshard.doctor(out, base=model),
    }


def read_with(stage: Stage, faults: Faults, name: str, call: str, nth: int) -> list[str]:
    """How a command that reads ends where that call fails with EIO, and what it says; without a
    call, the names of all its calls."""
    command, place = commands(stage)[name], str(stage.model.parent)

    def work() -> str:
        if not call:
            rule = faults.add("*", place, 1, COUNT)
            command()
            return json.dumps(faults.seen(rule))
        faults.add(call, place, nth, FAIL, errno.EIO)
        command()
        return ""

    return list(in_child(work))


def main() -> None:
    folder, plan = Path(sys.argv[1]), json.loads(sys.stdin.read())
    faults = Faults()
    stage = Stage(folder)
    gc.freeze()  # the collector of a fork would touch, and so copy, all that was there before
    for given in plan.get("trials", ()):
        trial = Trial(**{**given, "lacking": tuple(given["lacking"])})
        print(json.dumps(asdict(perform(stage, faults, trial))), flush=True)
        faults.clear()
    for read in plan.get("reads", ()):
        stage.reset(overwrite=True)
        print(json.dumps(read_with(stage, faults, *read)), flush=True)
        faults.clear()
    for ended in race(stage, 3, plan.get("races", 0)):
        print(json.dumps(ended), flush=True)


def loaded(line: str) -> Outcome:
    """An outcome that `main` printed."""
    given = json.loads(line)
    trial = Trial(**given.pop("trial"))
    return Outcome(replace(trial, lacking=tuple(trial.lacking)), **given)


if __name__ == "__main__":
    main()
