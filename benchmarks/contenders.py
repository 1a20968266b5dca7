"""Who takes part, as data: add a contender by adding a row."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import measure
from benchmarks.inputs import Input

# Copies as many bytes as the conversion writes, reads as many more as it reads beyond that, and
# waits for the disk, as reshard does: "$1" and "$2" are files of those sizes, "$3" the output.
_COPY = 'mkdir -p "$3" && cp "$1" "$3/copy" && cat "$2" > /dev/null && sync "$3/copy"'
# What verifying reads besides.
_READ_BACK = _COPY + ' && cat "$3/copy" > /dev/null'


def _inputs(given: Input, _: Path) -> Iterable[Path]:
    return (*given.source.rglob("*"), *given.base.rglob("*"))


def _copies(_: Input, scratch: Path) -> tuple[Path, Path]:
    return scratch / "copied", scratch / "read"


@dataclass(frozen=True, slots=True)
class Contender:
    """`command(input, target, scratch)` is what runs; `kinds` are the inputs it can convert.

    `every_size`: it also runs on the large inputs.
    `reads(input, scratch)`: the files it reads.
    """

    name: str
    kinds: tuple[str, ...]
    command: Callable[[Input, Path, Path], list[str]]
    note: str
    every_size: bool = False
    reads: Callable[[Input, Path], Iterable[Path]] = _inputs


def _reshard(*options: str) -> Callable[[Input, Path, Path], list[str]]:
    def command(given: Input, target: Path, _: Path) -> list[str]:
        convert = [sys.executable, "-m", "reshard", "convert", str(given.source), str(target)]
        if given.kind == "huggingface":
            return [*convert, "--to", "dcp", "--json", *options]
        if given.kind in ("state", "fsdp-state"):
            return [*convert, "--to", "deepspeed", "--json", *options]
        if given.kind == "quantised":
            return [*convert, "--json", *options]
        return [*convert, "--base", str(given.base), "--json", *options]

    return command


def _peer(name: str) -> Callable[[Input, Path, Path], list[str]]:
    def command(given: Input, target: Path, _: Path) -> list[str]:
        arguments = [name, str(given.source), str(given.base), str(target)]
        return [sys.executable, "-m", "benchmarks.peers", *arguments]

    return command


def _copy(script: str) -> Callable[[Input, Path, Path], list[str]]:
    """Plans a conversion first, to know how many bytes it reads and writes."""

    def command(given: Input, target: Path, scratch: Path) -> list[str]:
        report = json.loads(measure.run(_reshard("--dry-run")(given, target, scratch)).output)
        copied, read = _copies(given, scratch)
        written = int(report["bytes_written"])
        _fill(copied, given.source, written)
        _fill(read, given.source, max(int(report["bytes_read"]) - written, 0))
        return ["sh", "-c", script, "sh", str(copied), str(read), str(target)]

    return command


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


_ALL = ("deepspeed", "dcp", "huggingface", "quantised", "state", "fsdp-state")


def _to_dcp(given: Input, target: Path, _: Path) -> list[str]:
    convert = [sys.executable, "-m", "reshard", "convert", str(given.source), str(target)]
    return [*convert, "--to", "dcp", "--optimizer", "--json"]


CONTENDERS: tuple[Contender, ...] = (
    Contender(
        "reshard",
        _ALL,
        _reshard(),
        "as users run it: bfloat16, synced to disk, read back and verified",
        every_size=True,
    ),
    Contender(
        "reshard --no-verify",
        _ALL,
        _reshard("--no-verify"),
        "the same without reading back",
        every_size=True,
    ),
    Contender(
        "cp",
        _ALL,
        _copy(_COPY),
        "copies as many bytes as reshard writes, reads the rest of those it reads, syncs",
        every_size=True,
        reads=_copies,
    ),
    Contender(
        "cp, read back",
        _ALL,
        _copy(_READ_BACK),
        "the same, and reads the copy again, as reshard does when it verifies",
        every_size=True,
        reads=_copies,
    ),
    Contender(
        "zero_to_fp32",
        ("deepspeed",),
        _peer("zero_to_fp32"),
        "DeepSpeed's own script, float32 safetensors, not synced",
    ),
    Contender(
        "load and save",
        ("deepspeed",),
        _peer("load_and_save"),
        "get_fp32_state_dict_from_zero_checkpoint, load_state_dict, save_pretrained; not synced",
    ),
    Contender(
        "dcp_to_torch_save",
        ("dcp",),
        _peer("dcp_to_torch_save"),
        "torch's own tool, load_state_dict, save_pretrained; not synced",
    ),
    Contender(
        "load the model",
        ("dcp",),
        _peer("dcp_load"),
        "from_config, dcp.load, save_pretrained; not synced",
    ),
    Contender(
        "accelerate merge-weights",
        ("dcp",),
        _peer("merge_weights"),
        "float32 safetensors, no config; not synced",
    ),
    Contender(
        "load dequantised, save",
        ("quantised",),
        _peer("dequantise"),
        "from_pretrained on the CPU, save_pretrained; not synced",
    ),
    Contender("reshard, to DCP", ("state",), _to_dcp, "the same state for FSDP, verified"),
    Contender(
        "ds_to_universal",
        ("state",),
        _peer("ds_to_universal"),
        "DeepSpeed's own converter, two workers of each kind; not synced",
    ),
    Contender("load all, dcp.save", ("huggingface",), _peer("dcp_save"), "synced by dcp.save"),
)
