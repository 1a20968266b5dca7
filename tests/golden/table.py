"""Which golden checkpoints there are, and what is made of each; needs no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import reshard

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Golden:
    """A checkpoint: which oracle makes it, under which name, and what wrote it."""

    oracle: str
    recipe: str
    writers: tuple[str, ...]


GOLDEN: Mapping[str, Golden] = {
    "zero2": Golden("tests.oracle.launch", "zero2-bf16-w3", ("deepspeed", "torch")),
    "zero3": Golden("tests.oracle.launch", "zero3-bf16-w3", ("deepspeed", "torch")),
    "legacy": Golden("tests.oracle.launch", "legacy-zero1", ("deepspeed", "torch")),
    "dcp": Golden("tests.fsdp.oracle.launch", "odd-w3", ("torch",)),
}

#: The conversions whose files' digests are kept, by name.
CONVERSIONS: Mapping[str, Mapping[str, Any]] = {
    "hf": {},
    "hf, bfloat16, 1 KB": {"dtype": "bfloat16", "max_shard_size": "1KB"},
    "dcp": {"to": "dcp"},
}


def converted(name: str, options: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """The digests of a conversion's files."""
    reshard.convert(HERE / name / "checkpoint", folder, **options)
    return digests(folder)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of an output but `reshard.json`, which states reshard's version."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name != "reshard.json"
    }
