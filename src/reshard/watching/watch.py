"""Follow a run in a loop: find complete saves, convert them, run the command, delete old
outputs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct

from reshard.conversion.base_model import read_base
from reshard.conversion.convert import convert
from reshard.conversion.destination import check_apart, check_replaceable
from reshard.core.locations import MANIFEST
from reshard.core.options import PathLike, documented, parse
from reshard.errors import FormatError, IncompleteError, NotFoundError, ReshardError, WriteError
from reshard.progress import StagedProgress
from reshard.storage.local import Sources
from reshard.storage.paths import exists, is_file, status
from reshard.transfer.leftovers import remove_tree
from reshard.transfer.lock import TargetLock
from reshard.transfer.system import identity
from reshard.watching.command import run as run_command
from reshard.watching.declared import CONVERSION, WATCH
from reshard.watching.saves import Save, age, fingerprint, saves_of, unfinished
from reshard.watching.state_file import State

# Seconds that a sleep may take; the system knows a limit.
_LONGEST = 1e6


class Event(Struct, frozen=True):
    """Something that happened to a save: in words, and whether it is a failure."""

    save: str
    message: str
    failed: bool = False


Listen = Callable[[Event], None]


@documented(WATCH)
def watch(
    run: PathLike,
    out: PathLike,
    *,
    then: str | None = None,
    keep: int | None = None,
    interval: float = 30.0,
    once: bool = False,
    listen: Listen | None = None,
    progress: StagedProgress | None = None,
    **options: Any,
) -> int:
    """Convert each save of a run, once it is complete, into a folder of its step's name.

    The `options` are those of `reshard.convert`. Without `once` it runs until it is interrupted;
    with it, it converts the complete saves and returns the number of failed ones. `watch.json`
    beside the outputs records what was done: a later call continues from there.

    Raises `OptionError` for a wrong value, `WriteError` where another watch writes there, or the
    outputs are another run's, `NotFoundError` where the run holds saves of several models. A
    failure of one save is recorded, and does not end the watch.
    """
    own = {"then": then, "keep": keep, "interval": interval, "listen": listen}
    values = parse({**WATCH, **CONVERSION}, {"run": run, "out": out, **own, **options})
    place: Path = values["out"]
    check_apart(place, "run", [values["run"]])
    if values["base"] is not None:
        with Sources() as sources:
            read_base(values["base"], sources)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"the folder cannot be made: {error.strerror}.", path=place) from None
    lock = TargetLock(place / ".watch.lock")
    lock.take()
    try:
        return _Watch(values, options, progress).follow(once=once)
    finally:
        lock.release()


class _Watch:
    """One call: its options, and what was seen so far."""

    def __init__(
        self, values: dict[str, Any], options: dict[str, Any], progress: StagedProgress | None
    ) -> None:
        self._run: Path = values["run"]
        self._out: Path = values["out"]
        self._then: str | None = values["then"]
        self._keep: int | None = values["keep"]
        self._interval: float = values["interval"]
        self._listen: Listen | None = values["listen"]
        self._options, self._progress = options, progress
        self._state = State(self._out, self._run)
        # What each save was at the last look, and what was tried by this call.
        self._seen: dict[str, str] = {}
        self._tried: dict[str, str] = {}

    def follow(self, *, once: bool) -> int:
        """Look again and again; with `once`, twice."""
        try:
            self._look(self._scan())
            while True:
                self._state.say(f"waiting for saves of {self._run}")
                time.sleep(min(self._interval, _LONGEST))
                try:
                    found = self._scan()
                except NotFoundError as error:  # at the start, a mistake in the command
                    found = self._not_now(error)
                self._look(found)
                if once:
                    break
        finally:
            self._state.say("")
        return sum(state.status == "failed" for state in self._state.saves.values())

    def _scan(self) -> dict[Save, tuple[str, str]]:
        """The saves that are there: each one's fingerprint, and why it is not finished."""
        try:
            return {
                save: (fingerprint(save), unfinished(save, self._run))
                for save in saves_of(self._run)
            }
        except (IncompleteError, FormatError) as error:
            return self._not_now(error)

    def _not_now(self, error: ReshardError) -> dict[Save, tuple[str, str]]:
        """No saves: the training writes, and deletes what is too old, at any time."""
        self._tell(str(self._run), f"cannot be looked at now: {error}", failed=True)
        return {}

    def _look(self, saves: Mapping[Save, tuple[str, str]]) -> None:
        """Do what can be done now."""
        before, self._seen = self._seen, {save.name: print_ for save, (print_, _) in saves.items()}
        complete = []
        for save, (print_, reason) in saves.items():
            if save.name not in self._state.saves:
                self._state.set(save.name, status="waiting", source=str(save.path))
            if not reason and before.get(save.name) == print_:
                complete.append(save)
            elif self._state[save.name].status == "waiting":
                self._say(save.name, f"is not complete yet{': ' * bool(reason)}{reason}")
        for save in complete[: -self._keep] if self._keep else []:
            if self._state[save.name].status == "waiting":
                self._state.set(save.name, status="skipped", message="newer ones are kept")
        for save in complete[-self._keep :] if self._keep else complete:
            self._convert(save, saves[save][0])
        self._remove_old()

    def _convert(self, save: Save, print_: str) -> None:
        """Convert a save that was not, or that changed since, and run the command."""
        state, output = self._state[save.name], self._out / save.name
        current = state.fingerprint == print_
        if current and state.status in ("done", "removed"):
            return
        if state.status in ("failed", "waiting") and self._tried.get(save.name) == print_:
            return
        self._tried[save.name] = print_
        # Converted already, and the command was not run, or failed.
        made = current and (state.status == "converted" or state.exit_code is not None)
        if not (made and is_file(output / MANIFEST)) and not self._made(
            save, output, print_, again=bool(state.fingerprint)
        ):
            return
        if self._then is not None and not self._ran(save, output):
            return
        self._state.set(save.name, status="done", message="", exit_code=None)

    def _made(self, save: Save, output: Path, print_: str, *, again: bool) -> bool:
        """Whether the output is there now; an earlier one of other files is replaced."""
        if not again and is_file(output / MANIFEST):
            # It was converted, and the state was not written any more, or was removed.
            self._state.set(save.name, status="converted", fingerprint=print_, message="")
            self._tell(save.name, f"is there already: {output}")
            return True
        self._state.say(f"converting {save.name}")
        self._tell(save.name, f"is complete; converting to {output}")
        try:
            report = convert(
                save.path, output, overwrite=again, progress=self._progress, **self._options
            )
        except IncompleteError as error:
            self._state.set(save.name, status="waiting")
            self._say(save.name, f"is not complete yet: {error}")
            return False
        except ReshardError as error:
            # An exit code says that the output of this fingerprint is there: it is not.
            self._state.set(
                save.name, status="failed", fingerprint=print_, message=str(error), exit_code=None
            )
            self._tell(save.name, f"was not converted: {error}", failed=True)
            return False
        self._state.set(
            save.name,
            status="converted",
            source=str(save.path),
            fingerprint=print_,
            seconds=round(report.seconds, 3),
            message="",
            exit_code=None,
        )
        for finding in report.findings:
            if finding.severity != "info":
                self._tell(save.name, f"{finding.severity}: {finding.message}")
        checked = "verified" if report.verified else "NOT VERIFIED"
        self._tell(save.name, f"is converted, {checked}, in {report.seconds:.1f} s: {output}")
        return True

    def _ran(self, save: Save, output: Path) -> bool:
        """Whether the command ended well."""
        assert self._then is not None
        self._state.say(f"running the command for {save.name}")
        code = run_command(self._then, output=output, step=save.name, source=save.path)
        if code:
            message = f"the command ended with {code}: {self._then}"
            self._state.set(save.name, status="failed", message=message, exit_code=code)
            self._tell(save.name, message, failed=True)
            return False
        self._tell(save.name, "the command is done")
        return True

    def _remove_old(self) -> None:
        """Delete the outputs of all but the newest saves that are done."""
        if self._keep is None:
            return
        done = [
            name
            for name, state in self._state.saves.items()
            if state.status == "done" and exists(self._out / name)
        ]
        for name in sorted(done, key=age)[: -self._keep]:
            folder = self._out / name
            try:
                check_replaceable(folder, overwrite=True)
                failed = remove_tree(folder, identity(status(folder)))
            except ReshardError as error:
                self._say(name, f"its output is kept: {error}")
                continue
            if failed is not None:
                self._say(name, f"its output could not be deleted: {failed.strerror}")
                continue
            self._state.set(name, status="removed", message="newer ones are kept")
            self._tell(name, "its output is deleted, since newer ones are kept")

    def _say(self, name: str, message: str) -> None:
        """Record and report a message, unless it was reported before."""
        if self._state[name].message != message:
            self._state.set(name, message=message)
            self._tell(name, message)

    def _tell(self, name: str, message: str, *, failed: bool = False) -> None:
        if self._listen is not None:
            self._listen(Event(name, message, failed))
