"""Whatever happens: the new output or what stood before, no lie about it, a next run that works."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import library
from tests.faults.suite import (
    ERRORS,
    READ,
    RESUMED,
    SITUATIONS,
    SYSTEMS,
    Bench,
    calls,
    failures,
    kills,
    numbered,
    random_kills,
)
from tests.faults.table import OTHERS, PAGE, table
from tests.faults.trials import Outcome, Trial

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(
        library.compiler() is None or not Path("/proc/self/fd").exists(),
        reason="needs a C compiler and /proc",
    ),
]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """On the disk."""
    return Bench(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """In memory, where the system has such a file system: a disk is waited for in vain."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield Bench(tmp_path_factory.mktemp("faults"))
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Bench(Path(folder))


def before(outcome: Outcome) -> str:
    return "old" if outcome.trial.overwrite else "nothing"


def check_killed(outcome: Outcome) -> None:
    """Old or new stands; where neither does, the old is put back by whichever run comes next."""
    allowed = {before(outcome), "new"}
    if outcome.trial.overwrite and "renameat2" in outcome.trial.lacking:
        allowed.add("nothing")
    assert outcome.ended in ("killed", "done"), outcome
    assert outcome.stands in allowed, outcome
    assert outcome.kept, outcome
    assert outcome.rerun == "done", outcome


def check_random_kills(outcomes: list[Outcome]) -> None:
    """Each ends as any kill does. Together they hit the beginning and the end of a run."""
    for outcome in outcomes:
        check_killed(outcome)
    assert {"old", "nothing", "new"} <= {outcome.stands for outcome in outcomes}
    assert any(outcome.reused for outcome in outcomes)


def check_failed(outcome: Outcome) -> None:
    """A stated error and the state before, or the new output; the message is true."""
    assert outcome.ended in ("done", "error"), outcome
    if outcome.ended == "done" or "the new output is in its place" in outcome.message:
        assert outcome.stands == "new", outcome
    elif "The old output lies at" in outcome.message:
        assert outcome.stands == "nothing", outcome
    else:
        assert outcome.stands == before(outcome), outcome
    assert outcome.kept, outcome
    assert outcome.rerun == "done", outcome


def check_races(bench: Bench, rounds: int) -> None:
    """Of three equal commands at once, at least one succeeds, and none destroys the output."""
    for *ended, stands in bench.race(rounds):
        assert "done" in ended, ended
        assert set(ended) <= {"done", "refused"}, ended
        assert stands == "new"


def test_a_kill_at_every_call_of_the_commit(quick: Bench) -> None:
    """Where folders can exchange, and where they cannot and nothing can be locked."""
    trials = list(kills(calls(quick, late=True), ["kill before"], (SYSTEMS[0], SYSTEMS[2])))
    assert len(trials) > 100
    for outcome in quick.run(trials):
        assert outcome.ended == "killed", outcome
        check_killed(outcome)


@pytest.mark.slow
def test_a_kill_at_every_call_of_a_resumed_run(quick: Bench) -> None:
    """And the run that resumes it in turn reuses what both had finished."""
    counted = calls(quick, late=False, situations=RESUMED[:1])
    outcomes = quick.run(list(kills(counted, ["kill before"])))
    assert len(outcomes) > 50
    for outcome in outcomes:
        assert outcome.ended == "killed", outcome
        check_killed(outcome)
    assert sum(outcome.reused > 0 for outcome in outcomes) > len(outcomes) // 2


def test_kills_at_random_moments(quick: Bench) -> None:
    check_random_kills(quick.run(list(random_kills(50, seed=1))))


def test_each_call_of_the_commit_fails(quick: Bench) -> None:
    for outcome in quick.run(list(failures(calls(quick, late=True), ["EIO"], [()]))):
        check_failed(outcome)


def test_a_call_of_each_kind_fails(quick: Bench) -> None:
    """From the beginning on, of the source, of the output, and of a run that continues another."""
    situations = [*READ, SITUATIONS[0], SITUATIONS[3], RESUMED[0]]
    counted = calls(quick, late=False, situations=situations)
    trials = list(failures(counted, ["EIO"], [()], sampled=True))
    assert len({(trial.on, trial.call) for trial in trials}) > 25
    for outcome in quick.run(trials):
        check_failed(outcome)


@pytest.mark.parametrize(
    "sampled", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["sampled", "all"]
)
def test_a_call_of_a_command_that_reads_fails(quick: Bench, sampled: bool) -> None:
    """Also of `verify`, `inspect`, `diff` and `doctor`: it ends in words, or as without a fault."""
    names = ("verify", "verify against", "inspect", "diff", "doctor")
    counted = quick.read([(name, "", 0) for name in names])
    reads = []
    for name, (ended, said) in zip(names, counted, strict=True):
        assert ended == "done", said
        calls = numbered(json.loads(said))
        ends = dict(calls)
        reads += [(name, c, n) for c, n in calls if not sampled or n in (1, ends[c])]
    assert len(reads) > 60
    outcomes = quick.read(reads)
    for read, (ended, said) in zip(reads, outcomes, strict=True):
        assert ended in ("done", "error"), (read, said)
    assert sum(ended == "error" for ended, _ in outcomes) > len(reads) // 3


def test_three_equal_commands_at_once(quick: Bench) -> None:
    check_races(quick, 6)


def test_the_page_names_tests_that_are_there() -> None:
    for _, _, file, name in OTHERS:
        text = (Path(__file__).parent / file).read_text(encoding="utf-8")
        assert f"def {name}(" in text


@pytest.mark.slow
@pytest.mark.parametrize("situations", [SITUATIONS, RESUMED])
def test_a_kill_at_every_call(bench: Bench, situations: list[Trial]) -> None:
    counted = calls(bench, late=False, situations=situations)
    trials = list(kills(counted, ["kill before", "kill after"]))
    assert len(trials) > 500
    for outcome in bench.run(trials):
        check_killed(outcome)


@pytest.mark.slow
def test_many_kills_at_random_moments(bench: Bench) -> None:
    check_random_kills(bench.run(list(random_kills(400, seed=2))))


@pytest.mark.slow
@pytest.mark.parametrize("error", ERRORS)
def test_each_call_fails(bench: Bench, error: str) -> None:
    """Of a run that continues another with EIO alone."""
    situations = [*READ, *SITUATIONS, *(RESUMED if error == "EIO" else [])]
    counted = calls(bench, late=False, situations=situations)
    for outcome in bench.run(list(failures(counted, [error], SYSTEMS))):
        check_failed(outcome)


@pytest.mark.slow
def test_many_races(bench: Bench) -> None:
    check_races(bench, 100)


@pytest.mark.slow
def test_the_page_says_what_happens(bench: Bench) -> None:
    """A row for each fault, in the words of these very trials."""
    counted = calls(bench, late=False)
    rows = table(bench.run(list(failures(counted, ["EIO"], SYSTEMS))))
    text = PAGE.read_text(encoding="utf-8")
    for (fault, _), (new, replacing) in rows.items():
        lines = [line for line in text.splitlines() if line.startswith(f"| {fault}")]
        assert any(
            {*new} <= {*cells[2].split("; or ")} and {*replacing} <= {*cells[3].split("; or ")}
            for line in lines
            for cells in [[cell.strip() for cell in line.split("|")]]
        ), (fault, new, replacing)
