"""How long commands take on a tiny model that lies in memory: what every conversion pays."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from benchmarks import inputs, measure
from benchmarks.results import Start

# A file system in memory, where there is one.
_MEMORY = Path("/dev/shm")


def starts(runs: int, environment: Mapping[str, str], other: str = "") -> list[Start]:
    """Each command, `runs` times, one after the other. `other`: the source folder of another
    reshard, which runs, too."""
    with tempfile.TemporaryDirectory(dir=_MEMORY if _MEMORY.is_dir() else None) as folder:
        model, out = Path(folder, "source"), Path(folder, "out")
        inputs.make("tiny", Path(folder), 0)
        reshard = [sys.executable, "-m", "reshard"]
        commands = {
            "python -c pass": [sys.executable, "-c", "pass"],
            "reshard --version": [*reshard, "--version"],
            "reshard inspect": [*reshard, "inspect", str(model), "--json"],
            "reshard convert": [*reshard, "convert", str(model), str(out), "--to", "dcp", "-q"],
        }
        places = {"": dict(environment)}
        if other:
            places["other "] = {**environment, "PYTHONPATH": other}
        found: dict[str, list[measure.Run]] = {}
        for _ in range(runs + 1):  # the first writes the bytecode and is not counted
            for name, command in commands.items():
                for prefix, given in places.items():
                    shutil.rmtree(out, ignore_errors=True)
                    ran = measure.run(command, given)
                    found.setdefault(prefix + name, []).append(ran)
        return [
            Start(name, [run.cpu_seconds for run in ran[1:]], [run.seconds for run in ran[1:]])
            for name, ran in found.items()
        ]
