"""How a checkpoint's adapters scale: from the user, or from an `adapter_config.json` beside it."""

from __future__ import annotations

import os
from pathlib import Path

from reshard.errors import NotFoundError, PlanError
from reshard.naming.lora.find import AdapterConfig, Separated, parse_adapter_config
from reshard.storage import strict_json
from reshard.storage.local import Sources

_NAME = "adapter_config.json"
# verl puts the adapter's own folder beside the ranks' files.
_FOLDERS = (".", "lora_adapter", "..", "../lora_adapter")


def find(
    separated: Separated,
    checkpoint: Path,
    sources: Sources | None,
    *,
    alpha: float | None,
    config: Path | None,
) -> tuple[AdapterConfig, str]:
    """How the adapters scale, and a note of where that was read if the user did not say.

    It is `alpha`, else what the file `config` says, else the file near the checkpoint.

    Raises `PlanError` where nothing states alpha, or a file is of adapters of another rank.
    """
    if alpha is not None:
        return AdapterConfig(alpha), ""
    if config is not None:
        path = config / _NAME if config.is_dir() else config
        if not path.is_file():
            raise NotFoundError("there is no such file.", path=path)
        return _read(path, separated, sources), ""
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    for place in _FOLDERS:
        path = folder / place / _NAME
        if path.is_file():
            found = _read(path, separated, sources)
            return found, f"alpha {found.alpha:g} was taken from {os.path.normpath(path)}."
    raise PlanError(
        f"the checkpoint holds LoRA adapters on {len(separated.adapters)} modules (rank "
        f"{_ranks(separated)}), and not the alpha they were trained with.",
        hint="Pass --lora-alpha, or --adapter-config with the run's adapter_config.json.",
    )


def _read(path: Path, separated: Separated, sources: Sources | None) -> AdapterConfig:
    with Sources() as own:
        raw = strict_json.read_object((sources or own).open(path))
    config = parse_adapter_config(raw)
    if config.rank is not None and separated.ranks != (config.rank,):
        raise PlanError(
            f"it states rank {config.rank}, the checkpoint's adapters have rank "
            f"{_ranks(separated)}: it is of another run.",
            path=path,
            hint="Pass --lora-alpha, or --adapter-config with the run's own.",
        )
    return config


def _ranks(separated: Separated) -> str:
    return ", ".join(map(str, separated.ranks))
