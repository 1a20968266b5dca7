"""What is measured, as data: directions, and who takes part in each. Add a contender by a row."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import inputs, measure

# Copies as many bytes as the conversion writes, reads as many more as it reads beyond that, and
# waits for the disk, as reshard does; then it reads the copy again, as reshard does to verify.
# "$1" and "$2" are files of those sizes, "$3" is the output.
_COPY = (
    'mkdir -p "$3" && cp "$1" "$3/copy" && cat "$2" > /dev/null && sync "$3/copy"'
    f' && echo {measure.MARK} && cat "$3/copy" > /dev/null'
)
#: Rows of `cp`: the run until the copy is on the disk, and the whole.
CP, CP_READ_BACK = "cp", "cp, read back"
RESHARD, NO_VERIFY = "reshard", "reshard --no-verify"
OLD, OLD_NO_VERIFY = "other reshard", "other reshard --no-verify"


@dataclass(frozen=True, slots=True)
class Ready:
    """An input, made: the checkpoint, the model that training started from, and what copies take
    instead: files of as many bytes as reshard writes, and as it reads beyond that."""

    source: Path
    base: Path
    copied: Path
    read: Path
    written_nbytes: int


@dataclass(frozen=True, slots=True)
class Direction:
    """A conversion: `kind` is how its input is made (`inputs.MAKERS`), `options` are reshard's.

    It is measured at every size, or only `at` the one nearest to it (GB of 16-bit weights).
    `times` is how many bytes its source has, as a multiple of these.
    """

    key: str
    title: str
    kind: str
    options: tuple[str, ...] = ()
    at: float | None = None
    times: float = 2.0
    based: bool = True

    def command(self, source: Path, base: Path, target: Path) -> list[str]:
        """reshard's command line for it."""
        convert = [sys.executable, "-m", "reshard", "convert", str(source), str(target)]
        based = ["--base", str(base)] if self.based else []
        return [*convert, *based, *self.options, "--json"]


DIRECTIONS: tuple[Direction, ...] = (
    Direction("zero2", "ZeRO-2 to Hugging Face", "zero2", times=3),
    Direction("zero3", "ZeRO-3 to Hugging Face", "zero3"),
    Direction("fsdp2", "FSDP2 (DCP) to Hugging Face", "dcp"),
    Direction("to-dcp", "Hugging Face to DCP", "huggingface", ("--to", "dcp"), None, 1, False),
    Direction("fp8", "fp8 to bfloat16", "fp8", ("--dtype", "bfloat16"), 1, 1, False),
    Direction("megatron", "Megatron (torch_dist) to Hugging Face", "megatron", (), 1, 1),
    Direction(
        "to-megatron", "Hugging Face to Megatron", "huggingface", ("--to", "megatron"), 1, 1, False
    ),
    Direction(
        "zero2-universal",
        "ZeRO-2 with its optimizer to universal",
        "zero2_state",
        ("--to", "deepspeed"),
        0.25,
        7,
        False,
    ),
    Direction(
        "zero2-state-dcp",
        "ZeRO-2 with its optimizer to DCP",
        "zero2_state",
        ("--to", "dcp", "--optimizer"),
        0.25,
        7,
        False,
    ),
    Direction(
        "fsdp2-universal",
        "FSDP2 (DCP) with its optimizer to universal",
        "dcp_state",
        ("--to", "deepspeed"),
        0.25,
        6,
        False,
    ),
    Direction(
        "universal-dcp",
        "universal to DCP with the optimizer",
        "universal",
        ("--to", "dcp", "--optimizer"),
        0.25,
        6,
        False,
    ),
)

#: What a contender runs: (its direction, the input, the output) to a command line.
Command = Callable[[Direction, Ready, Path], list[str]]


@dataclass(frozen=True, slots=True)
class Contender:
    """`name` is its row; `directions` are those it takes part in, none: all.

    `group` is what `--only` calls it: `reshard`, `cp` or `peers`. `guess` are seconds before
    anything is measured: of the start, and of each GB of the source. `marked` is the row of what
    it had done when it printed `measure.MARK`. `path` replaces PYTHONPATH.
    """

    name: str
    group: str
    command: Command
    note: str
    guess: tuple[float, float]
    directions: tuple[str, ...] = ()
    marked: str = ""
    path: str = ""
    copies: bool = field(default=False)

    def reads(self, ready: Ready) -> Iterable[Path]:
        """The files that it reads."""
        if self.copies:
            return ready.copied, ready.read
        return (*ready.source.rglob("*"), *ready.base.rglob("*"))


def _reshard(*options: str) -> Command:
    def command(direction: Direction, ready: Ready, target: Path) -> list[str]:
        return [*direction.command(ready.source, ready.base, target), *options]

    return command


def _peer(name: str) -> Command:
    def command(_: Direction, ready: Ready, target: Path) -> list[str]:
        arguments = [name, str(ready.source), str(ready.base), str(target)]
        return [sys.executable, "-m", "benchmarks.peers", *arguments]

    return command


def _copy(_: Direction, ready: Ready, target: Path) -> list[str]:
    return ["sh", "-c", _COPY, "sh", str(ready.copied), str(ready.read), str(target)]


_ZERO = ("zero2", "zero3")
_PEER_GUESS = (5.0, 3.5)
CONTENDERS: tuple[Contender, ...] = (
    Contender(
        RESHARD,
        "reshard",
        _reshard(),
        "as users run it: written, synced to disk, read back and verified",
        (0.3, 0.5),
    ),
    Contender(
        NO_VERIFY, "reshard", _reshard("--no-verify"), "the same without reading back", (0.3, 0.4)
    ),
    Contender(
        CP_READ_BACK,
        "cp",
        _copy,
        "`cp` of as many bytes as reshard writes, reading of the rest of those that it reads, "
        "`sync`; and reading the copy again, as reshard does to verify",
        (0.0, 0.5),
        marked=CP,
        copies=True,
    ),
    Contender(
        "zero_to_fp32",
        "peers",
        _peer("zero_to_fp32"),
        "DeepSpeed's own script, float32 safetensors; not synced",
        _PEER_GUESS,
        _ZERO,
    ),
    Contender(
        "load, save_pretrained",
        "peers",
        _peer("load_and_save"),
        "`get_fp32_state_dict_from_zero_checkpoint`, `load_state_dict`, `save_pretrained`; not "
        "synced",
        _PEER_GUESS,
        _ZERO,
    ),
    Contender(
        "dcp_to_torch_save",
        "peers",
        _peer("dcp_to_torch_save"),
        "torch's own tool, `load_state_dict`, `save_pretrained`; not synced",
        _PEER_GUESS,
        ("fsdp2",),
    ),
    Contender(
        "dcp.load, save_pretrained",
        "peers",
        _peer("dcp_load"),
        "`from_config`, `dcp.load`, `save_pretrained`; not synced",
        _PEER_GUESS,
        ("fsdp2",),
    ),
    Contender(
        "accelerate merge-weights",
        "peers",
        _peer("merge_weights"),
        "float32 safetensors, no config; not synced",
        _PEER_GUESS,
        ("fsdp2",),
    ),
    Contender(
        "load_file, dcp.save",
        "peers",
        _peer("dcp_save"),
        "all tensors loaded, then `dcp.save`, which syncs",
        _PEER_GUESS,
        ("to-dcp",),
    ),
    Contender(
        "from_pretrained, save_pretrained",
        "peers",
        _peer("dequantise"),
        "transformers dequantises on the CPU; not synced",
        _PEER_GUESS,
        ("fp8",),
    ),
    Contender(
        "ds_to_universal",
        "peers",
        _peer("ds_to_universal"),
        "DeepSpeed's own converter, two workers of each kind; not synced",
        (10.0, 6.0),
        ("zero2-universal",),
    ),
)


def taking_part(direction: Direction, only: Sequence[str] = (), other: str = "") -> list[Contender]:
    """The contenders of a direction, of the groups or names `only`; none: all. `other` is the
    source folder of another reshard, which runs, too."""
    found = []
    for one in CONTENDERS:
        if direction.key not in (one.directions or (direction.key,)):
            continue
        if only and one.group not in only and one.name not in only:
            continue
        found.append(one)
        if other and one.group == "reshard":
            found.append(
                Contender(f"other {one.name}", one.group, one.command, "", one.guess, path=other)
            )
    return found


@contextmanager
def made(direction: Direction, gb: float, folder: Path) -> Iterator[Ready]:
    """The input of a direction under `folder`, removed afterwards."""
    place = folder / "input"
    inputs.make(direction.kind, place, gb)
    source, base = place / "source", place / "base"
    command = direction.command(source, base, folder / "output")
    report = json.loads(measure.run([*command, "--dry-run"]).output)
    written = int(report["bytes_written"])
    ready = Ready(source, base, place / "copied", place / "read", written)
    try:
        _fill(ready.copied, source, written)
        _fill(ready.read, source, max(int(report["bytes_read"]) - written, 0))
        yield ready
    finally:
        inputs.remove(place)


def _fill(path: Path, source: Path, nbytes: int) -> None:
    """Write `nbytes` bytes of the checkpoint's own files, the largest first, to `path`.

    They are taken again where they are fewer: of codes, twice as many bytes are written as read.
    """
    files = [file for file in source.rglob("*") if file.is_file() and file.stat().st_size]
    files.sort(key=lambda file: -file.stat().st_size)
    with open(path, "wb") as out:
        for file in itertools.cycle(files):
            if nbytes <= 0:
                break
            with open(file, "rb") as part:
                while nbytes > 0 and (block := part.read(min(nbytes, 1 << 22))):
                    nbytes -= out.write(block)
