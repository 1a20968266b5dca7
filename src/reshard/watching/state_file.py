"""The state of each save, in a small JSON file: for users, and for a restart.

    OUT/watch.json    {"version": 1, "run": ..., "doing": ..., "pid": ..., "saves": {NAME: {...}}}

It is rewritten at each change, completely or not at all.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

from msgspec import Struct, field
from msgspec.structs import asdict, replace

from reshard.errors import FormatError, WriteError
from reshard.storage import strict_json
from reshard.storage.local import read_start
from reshard.storage.paths import is_file, real
from reshard.storage.texts import write_text

#: The file's name, inside the folder of the outputs.
STATE_FILE = "watch.json"
_VERSION = 1
_MAX_NBYTES = 64 << 20

Status = Literal["waiting", "converted", "done", "failed", "skipped", "removed"]


class SaveState(Struct, frozen=True):
    """A save's state, as of a fingerprint of its files.

    waiting: seen, and not complete. converted: the output is there, the command did not end yet.
    done: both are. failed: the conversion or the command failed, `message` says how, `exit_code` is
    the command's. skipped: older than what is kept. removed: the output was deleted since newer
    ones are kept. `seconds` the conversion took.
    """

    status: Status
    source: str = ""
    fingerprint: str = ""
    message: str = ""
    seconds: float | None = None
    exit_code: int | None = None


class RunState(Struct):
    """The state of all saves; `doing` says in words what watch is doing now."""

    run: str
    doing: str = ""
    version: int = _VERSION
    pid: int = 0
    saves: dict[str, SaveState] = field(default_factory=dict)


class State:
    """The state of one folder of outputs, and its file."""

    def __init__(self, out: Path, run: Path) -> None:
        """Reads what an earlier watch left. Raises `FormatError` where the file is damaged,
        `WriteError` where it is another run's."""
        self.path: Path = out / STATE_FILE
        self._state = RunState(os.fspath(real(run)))
        if is_file(self.path):
            found = _read(self.path)
            if found.run != self._state.run:
                raise WriteError(
                    f"the outputs of another run are there: {found.run}.",
                    path=out,
                    hint="Name another folder for the outputs of this run.",
                )
            self._state = found
        self._state.pid = os.getpid()

    def __getitem__(self, name: str) -> SaveState:
        return self._state.saves.get(name, SaveState("waiting"))

    @property
    def saves(self) -> dict[str, SaveState]:
        """The states by name."""
        return self._state.saves

    def set(self, name: str, **changes: Any) -> SaveState:
        """Note a change of a save's state, in the file too."""
        self._state.saves[name] = replace(self[name], **changes)
        self._write()
        return self[name]

    def say(self, doing: str) -> None:
        """Note what is done now."""
        if doing != self._state.doing:
            self._state.doing = doing
            self._write()

    def _write(self) -> None:
        values = asdict(self._state)
        values["saves"] = {name: asdict(state) for name, state in self.saves.items()}
        write_text(self.path, json.dumps(values, indent=2) + "\n")


def _read(path: Path) -> RunState:
    text = read_start(path, _MAX_NBYTES)
    try:
        found = strict_json.parse_as(text, RunState, str(path))
    except FormatError:
        found = RunState("", version=0)
    if found.version != _VERSION:
        raise FormatError(
            "it is damaged, or of another version of reshard.",
            path=path,
            hint="Remove it: watch leaves existing outputs as they are.",
        )
    return found
