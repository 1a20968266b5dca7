"""How a checkpoint's adapters scale: from the user, or from a file beside it.

adapter_config.json     PEFT's; in verl's runs in the folder `lora_adapter`
lora_train_meta.json    verl's, since 0.9, beside the ranks' files: {"r", "lora_alpha", ..}
"""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path

from reshard.errors import NotFoundError, PlanError
from reshard.naming.lora.find import AdapterConfig, Separated, parse_adapter_config
from reshard.storage import strict_json
from reshard.storage.local import Sources

_NAME = "adapter_config.json"
# verl puts the adapter's own folder beside the ranks' files.
_FOLDERS = (".", "lora_adapter", "..", "../lora_adapter")
# Of the adapters of the ranks' files beside it, and of no other.
_META = "lora_train_meta.json"


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
    near = (path for place in _FOLDERS if (path := folder / place / _NAME).is_file())
    paths = [folder / _META] if (folder / _META).is_file() else []
    found = [(path, _read(path, separated, sources)) for path in (*paths, *islice(near, 1))]
    # verl's merger writes an alpha of 0 into its adapter folder where it does not know it.
    found = [(path, stated) for path, stated in found if stated.alpha] or found[:1]
    if found:
        return _agreed(found)
    raise PlanError(
        f"the checkpoint holds LoRA adapters on {len(separated.adapters)} modules (rank "
        f"{_ranks(separated)}), and not the alpha they were trained with.",
        hint="Pass --lora-alpha, or --adapter-config with the run's adapter_config.json.",
    )


def _agreed(found: list[tuple[Path, AdapterConfig]]) -> tuple[AdapterConfig, str]:
    """The first of PEFT's files, which says most, or verl's; the two must state one alpha."""
    path, config = next((each for each in found if each[0].name == _NAME), found[0])
    meta, stated = found[0]
    if not stated.alpha:
        raise PlanError(
            "it states an alpha of 0, which switches the adapters off: alpha was not known when it "
            "was written.",
            path=path,
            hint="Pass --lora-alpha.",
        )
    if meta.name == _META and stated.alpha != config.alpha:
        raise PlanError(
            f"it states alpha {config.alpha:g}, and {meta} alpha {stated.alpha:g}.",
            path=path,
            hint="Pass --lora-alpha.",
        )
    return config, f"alpha {config.alpha:g} was taken from {os.path.normpath(path)}."


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
