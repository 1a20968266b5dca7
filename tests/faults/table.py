"""`docs/reliability.md`, from what the trials showed: `python -m tests.faults.table`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

from tests.faults.suite import (
    ERRORS,
    READ,
    RESUMED,
    ROOT,
    SYSTEMS,
    Bench,
    calls,
    failures,
    kills,
    random_kills,
)
from tests.faults.trials import Outcome

PAGE = ROOT / "docs" / "reliability.md"
HEAD = """# What happens when something goes wrong

The table shows what a conversion leaves behind after each kind of failure. It is the result of
tests: `python -m tests.faults.table` runs the suite in `tests/faults`, which repeats a
conversion, each time with another fault: as a new output, and with `--overwrite` onto an output
that reshard wrote; on a current system, on one that cannot exchange two folders (NFS, many FUSE),
and on one that also lacks flock and fallocate. After every fault the same command ran again
without a fault, and after every other kill with `--resume`: it always succeeded, with the same
bytes, and left only the new output. No trial ever left a torn output, or removed an old one
without putting the new one in its place. Kills say nothing about a power cut, so
`tests/commit/test_order.py` checks the order in which files are synced and renamed in a trace of
the system calls.

*as before*: what was under the output's name is still there, nothing else is left, and the
message says so. *done*: the run succeeded, and the new output is in place. *a resumed run*: one
with `--resume`, after a run that was killed before its commit; it keeps its files beside the
output. *of a source*: the call is about the checkpoint or the base, not about the output. The
calls are those that Python makes of the C library, `stat` and the reading of folders included;
each call of a run fails once.
"""
# What other tests of the folder show; each names the test.
OTHERS = (
    ("three equal commands at once", "one writes, the others are refused or come after it",
     "test_faults.py", "test_three_equal_commands_at_once"),
    ("the disk fills up, or has no room", "an error; as before",
     "test_limits.py", "test_a_small_file_system"),
    ("the file system has no inodes left", "an error; as before",
     "test_limits.py", "test_a_small_file_system"),
    ("a limit on the size of files (RLIMIT_FSIZE)", "an error; as before",
     "test_limits.py", "test_a_limit_on_the_size_of_files"),
    ("Ctrl-C, SIGTERM or SIGHUP at any moment: during imports and after the commit, too",
     "exit code 130; the message says what is under the name; `--resume` keeps finished work",
     "../commit/test_interrupts.py", "test_what_stands_is_said"),
    ("the files of a killed run are damaged: a torn, edited or forged journal, changed bytes",
     "with `--resume`: pieces that differ from the journal are made again; the same bytes",
     "../resume/test_damage.py", "test_bytes_that_were_changed_after_their_line"),
    ("a source changes between a killed run and `--resume`, even if its times do not",
     "nothing is reused, and a finding names the file",
     "../resume/test_damage.py", "test_a_source_that_changed_between"),
    ("files beside the output belong to another user or a live process, are unmarked, or links",
     "reshard neither reads nor removes them; an error or a finding names them",
     "../resume/test_damage.py", "test_a_folder_that_is_not_ours"),
    ("a source or a file of the base changes, shrinks, grows, is replaced or deleted meanwhile",
     "an error that names the file; as before",
     "test_limits.py", "test_a_source_that_changes"),
)  # fmt: skip
Rows = dict[tuple[str, str], tuple[set[str], set[str]]]


def words(outcome: Outcome) -> str:
    """What happened, in a few words."""
    assert outcome.ended != "crashed", outcome
    if outcome.ended == "killed":
        return {
            "nothing": "the old output is aside; the next run puts it back"
            if outcome.trial.overwrite
            else "nothing stands",
            "old": "the old output stands",
            "new": "the new output stands",
        }[outcome.stands]
    if outcome.ended == "done":
        return "done"
    if "the new output is in its place" in outcome.message:
        return "an error that says that the new output stands"
    if "The old output lies at" in outcome.message:
        return "an error that says where the old output lies; the next run puts it back"
    return "an error; as before"


def table(outcomes: Iterable[Outcome]) -> Rows:
    """By fault and error: what happened to a new output, and to one that replaces another."""
    rows: Rows = {}
    for outcome in outcomes:
        trial = outcome.trial
        key = {
            "fail": (f"`{trial.call}` fails", trial.error),
            "short": (f"`{trial.call}` transfers less than it is asked for", ""),
            "timer": ("SIGKILL at a random moment", ""),
        }.get(trial.action, ("SIGKILL at any system call", ""))
        if trial.resumed:
            key = (f"{key[0]}, of a resumed run", key[1])
        if trial.on == "source":
            key = (f"{key[0]}, of a source", key[1])
        cells = rows.setdefault(key, (set(), set()))
        cells[trial.overwrite].add(words(outcome))
    return rows


def merged(rows: Rows) -> dict[tuple[str, str, str], list[str]]:
    """Rows that differ only in the error, as one: the errors by fault and cells."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for (fault, error), (new, replacing) in rows.items():
        key = (fault, "; or ".join(sorted(new)), "; or ".join(sorted(replacing)))
        found.setdefault(key, []).append(error)
    return found


def page(rows: Rows) -> str:
    """The page's text."""
    lines = [HEAD, "| fault | a new output | replacing one |", "|---|---|---|"]
    for (fault, new, replacing), errors in sorted(merged(rows).items()):
        named = f" with {', '.join(sorted(errors))}" if any(errors) else ""
        lines.append(f"| {fault}{named} | {new} | {replacing or 'the same'} |")
    lines += ["", "| also | |", "|---|---|"]
    lines += [f"| {fault} | {what} |" for fault, what, *_ in OTHERS]
    return "\n".join(lines) + "\n"


def trials(bench: Bench) -> list[Outcome]:
    """All that the page is made from: some thousand runs, some minutes."""
    counted = calls(bench, late=False)
    resumed = calls(bench, late=False, situations=RESUMED)
    read = calls(bench, late=False, situations=READ)
    plan = [
        *kills({**counted, **resumed}, ["kill before"]),
        *random_kills(400, seed=2),
        *failures(counted, ERRORS, SYSTEMS[:1]),
        *failures(read, ERRORS, SYSTEMS[:1]),
        *failures(counted, ["EIO"], SYSTEMS[1:]),
        *failures(resumed, ["EIO"], SYSTEMS[:1]),
    ]
    return bench.run(plan)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        PAGE.write_text(page(table(trials(Bench(Path(folder))))), encoding="utf-8")


if __name__ == "__main__":
    main()
