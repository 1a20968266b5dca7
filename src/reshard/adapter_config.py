"""How a checkpoint's adapters scale: from the user, or from an `adapter_config.json` beside it."""

from __future__ import annotations

import json
from pathlib import Path

from reshard.errors import FormatError, NotFoundError, PlanError
from reshard.naming.adapters import AdapterConfig, Separated, parse_adapter_config
from reshard.options import Options
from reshard.storage import Sources

_NAME = "adapter_config.json"
# verl puts the adapter's own folder beside the ranks' files.
_FOLDERS = (".", "lora_adapter", "..", "../lora_adapter")
_MAX_NBYTES = 16 << 20


def find(options: Options, checkpoint: Path, sources: Sources | None) -> AdapterConfig | None:
    """`--lora-alpha`, else `--adapter-config`, else the file near the checkpoint, else None."""
    choice = options.lora
    if choice.alpha is not None:
        return AdapterConfig(choice.alpha)
    if choice.config is not None:
        path = choice.config / _NAME if choice.config.is_dir() else choice.config
        if not path.is_file():
            raise NotFoundError("there is no such file.", path=path)
        return _read(path, sources)
    for folder in _FOLDERS:
        path = checkpoint / folder / _NAME
        if path.is_file():
            return _read(path, sources)
    return None


def unknown(separated: Separated) -> PlanError:
    """The error where alpha is needed and nothing states it."""
    ranks = ", ".join(map(str, sorted({a.rank for a in separated.adapters.values()})))
    return PlanError(
        f"the checkpoint holds LoRA adapters on {len(separated.adapters)} modules (rank {ranks}), "
        "and not the alpha they were trained with.",
        hint="Pass --lora-alpha, or --adapter-config with the run's adapter_config.json.",
    )


def _read(path: Path, sources: Sources | None) -> AdapterConfig:
    with Sources() as own:
        source = (sources or own).open(path)
        text = source.read(0, min(source.size, _MAX_NBYTES))
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError):
        raise FormatError("it is no JSON.", path=path) from None
    if not isinstance(raw, dict):
        raise FormatError("its JSON is not an object.", path=path)
    return parse_adapter_config(raw)
