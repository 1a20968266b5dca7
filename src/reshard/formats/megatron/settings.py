"""What a run states about its model, for comparison with the base's config.

    common.pt                       `args`: Megatron-LM, slime, ms-swift
    run_config.yaml                 Megatron-Bridge
    ../transformer_config.json      verl; ../../ in the layout of 0.9
    ../context/model.yaml           NeMo 2

All are optional, and none is needed for the weights. From the two YAML files, only lines `name:
value` are used, for settings that occur once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct

from reshard.containers import torch as torchfile
from reshard.containers.torch import Opaque
from reshard.core.findings import Finding
from reshard.core.regex import regex
from reshard.errors import ReshardError
from reshard.formats.signs import MCORE_COMMON
from reshard.naming.megatron_args import SETTINGS
from reshard.storage import strict_json
from reshard.storage.local import Sources
from reshard.storage.paths import file_size, is_file

_JSON = ("../transformer_config.json", "../../transformer_config.json")
_YAML = ("run_config.yaml", "../context/model.yaml")
_LINE = regex(r"\s*(\w+):\s*(true|false|\d{1,9})\s*", re.IGNORECASE)
# A run's settings take tens of KB.
_MAX_NBYTES = 4 << 20


class Stated(Struct, frozen=True):
    """The settings that are looked at, by Megatron's names."""

    settings: Mapping[str, Any]
    findings: tuple[Finding, ...] = ()


def read(folder: Path, sources: Sources) -> Stated:
    """The settings of the run that saved a folder; empty where no file states them.

    A file that cannot be read is skipped, `common.pt` with a finding.
    """
    settings: dict[str, Any] = {}
    findings = []
    for values in _others(folder, sources):
        settings.update(values)
    path = folder / MCORE_COMMON
    if is_file(path):
        try:
            settings.update(_args(torchfile.read(sources.open(path)).value))
        except ReshardError as error:
            message = f"the run's settings cannot be read, and were not compared: {error.message}"
            findings.append(Finding("settings-unread", message, subject=MCORE_COMMON))
    kept = {
        name: value
        for name, value in settings.items()
        if name in SETTINGS and isinstance(value, bool | int)
    }
    return Stated(kept, tuple(findings))


def _args(common: object) -> Mapping[str, Any]:
    """Megatron-LM's arguments, an `argparse.Namespace`."""
    args = common.get("args") if isinstance(common, dict) else None
    state = args.state if isinstance(args, Opaque) else args
    return state if isinstance(state, dict) else {}


def _others(folder: Path, sources: Sources) -> Iterator[Mapping[str, Any]]:
    for name in _YAML:
        path = _beside(folder, name)
        if is_file(path) and file_size(path) <= _MAX_NBYTES:
            source = sources.open(path)
            text = source.read(0, source.size).decode("utf-8", "replace")
            yield _of_yaml(text)
    for name in _JSON:
        path = _beside(folder, name)
        if is_file(path):
            try:
                yield strict_json.read_object(sources.open(path))
            except ReshardError:
                continue


def _beside(folder: Path, name: str) -> Path:
    steps = name.split("/")
    while steps[0] == "..":
        folder, steps = folder.parent, steps[1:]
    return folder.joinpath(*steps)


def _of_yaml(text: str) -> dict[str, Any]:
    values: dict[str, set[str]] = {}
    for line in text.splitlines():  # over all lines at once, `\s*` would take the square of them
        match = _LINE.fullmatch(line)
        if match:
            values.setdefault(match[1], set()).add(match[2].lower())
    once = {name: next(iter(found)) for name, found in values.items() if len(found) == 1}
    return {
        name: value == "true" if value in ("true", "false") else int(value)
        for name, value in once.items()
    }
