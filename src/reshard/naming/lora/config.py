"""`adapter_config.json`: find it near a checkpoint, and check it before any names are compared.

    {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "use_rslora": false, "alpha_pattern": {}, ...}

It says how the adapters scale, which no tensor shows, and whether a merge is `W + B A s` at all.
verl's runs have `lora_train_meta.json` beside the ranks' files, since 0.9: {"r", "lora_alpha", ..}.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from msgspec import Struct, field
from msgspec.structs import replace

from reshard.errors import FormatError, NotFoundError, UnsupportedError, at, brief
from reshard.naming.lora import methods, patterns
from reshard.storage import strict_json
from reshard.storage.local import Sources
from reshard.storage.paths import is_file, is_folder

NAME = "adapter_config.json"
# verl puts the adapter's own folder beside the ranks' files.
_FOLDERS = (".", "lora_adapter", "..", "../lora_adapter")
# It belongs to the adapters in the ranks' files beside it, and to no others.
_META = "lora_train_meta.json"
# Far above any alpha; an infinite one would make a model of NaNs.
_MAX_ALPHA = 1e9
_MAX_RANK = 1 << 24


class AdapterConfig(Struct, frozen=True):
    """How adapters scale, and what else their config says that an output depends on.

    `alphas` and `ranks`: pattern of module names -> alpha or rank, where it differs from `alpha`
    and `rank`. `rank` None: not stated. `init` is an initialisation that changed the base's
    weights, empty where none did. `unknown` are settings that no known version of PEFT has.
    """

    alpha: float
    rslora: bool = False
    alphas: Mapping[str, float] = field(default_factory=dict)
    fan_in_fan_out: bool = False
    rank: int | None = None
    ranks: Mapping[str, int] = field(default_factory=dict)
    init: str = ""
    base_name: str | None = None
    revision: str | None = None
    task_type: str | None = None
    unknown: tuple[str, ...] = ()

    def scaling(self, module: str, rank: int) -> float:
        """What `left @ right` is multiplied with: alpha / r, or alpha / sqrt(r) for rsLoRA.

        `module` is the module's name in the model that PEFT wrapped.
        """
        key = patterns.key_of(self.alphas, module)
        alpha = self.alpha if key is None else self.alphas[key]
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def to_json(self) -> dict[str, Any]:
        """What `reshard.json` records: all that decides a value, and no path."""
        return {
            "alpha": self.alpha,
            "rslora": self.rslora,
            "alphas": dict(self.alphas),
            "fan_in_fan_out": self.fan_in_fan_out,
        }


class ConfigFile(Struct, frozen=True):
    """A config that was read: from where, and whether the user named it (or it was found).

    `disputed` is a file that states another alpha.
    """

    path: Path
    config: AdapterConfig
    named: bool = False
    disputed: Path | None = None


def read_near(checkpoint: Path, sources: Sources | None, named: Path | None) -> ConfigFile | None:
    """The config that the user named, or that lies in or above the checkpoint's folder.

    Raises `NotFoundError` where the named one is not there, and what `parse_adapter_config` does.
    """
    if named is not None:
        path = named / NAME if is_folder(named) else named
        if not is_file(path):
            raise NotFoundError("there is no such file.", path=path)
        return ConfigFile(path, _read(path, sources), named=True)
    folder = checkpoint if is_folder(checkpoint) else checkpoint.parent
    near = (path for place in _FOLDERS if is_file(path := folder / place / NAME))
    verls = [folder / _META] if is_file(folder / _META) else []
    found = [ConfigFile(path, _read(path, sources)) for path in (*islice(near, 1), *verls)]
    # verl's merger writes an alpha of 0 into its adapter folder where it does not know it.
    known = [file for file in found if file.config.alpha] or found[:1]
    if len({file.config.alpha for file in known}) > 1:
        return replace(known[0], disputed=known[1].path)
    return known[0] if known else None


def _read(path: Path, sources: Sources | None) -> AdapterConfig:
    with Sources() as own:
        raw = strict_json.read_object((sources or own).open(path))
    with at(path):
        return parse_adapter_config(raw)


def parse_adapter_config(raw: Mapping[str, Any]) -> AdapterConfig:
    """The settings of a parsed `adapter_config.json` that a merge needs.

    Raises `UnsupportedError` for another method than LoRA or an unsupported setting, by its
    name, and `FormatError` for values of the wrong kind.
    """
    _check_method(raw.get("peft_type", "LORA"))
    for key, setting in methods.REFUSED_SETTINGS.items():
        if raw.get(key) not in (None, False, [], {}):
            raise UnsupportedError(
                f"adapters with {setting.title} ({key} = {brief(raw[key])}) are not supported.",
                hint=methods.hint(setting.merges),
            )
    alpha, alphas = raw.get("lora_alpha"), raw.get("alpha_pattern") or {}
    if not isinstance(alphas, Mapping) or not all(map(_is_alpha, (alpha, *alphas.values()))):
        shown = f"{brief(alpha)} and alpha_pattern {brief(alphas)}"
        raise FormatError(f"lora_alpha {shown} are not numbers.")
    rank, ranks = raw.get("r"), raw.get("rank_pattern") or {}
    if not isinstance(ranks, Mapping) or not all(map(_is_rank, ranks.values())):
        raise FormatError(f"rank_pattern {brief(ranks)} is not of ranks.")
    patterns.check(alphas, "alpha_pattern")
    patterns.check(ranks, "rank_pattern")
    init = raw.get("init_lora_weights")
    known = {*methods.USED_SETTINGS, *methods.IDLE_SETTINGS, *methods.REFUSED_SETTINGS}
    return AdapterConfig(
        float(raw["lora_alpha"]),
        rslora=bool(raw.get("use_rslora")),
        alphas={name: float(value) for name, value in alphas.items()},
        fan_in_fan_out=bool(raw.get("fan_in_fan_out")),
        rank=rank if _is_rank(rank) else None,
        ranks=dict(ranks),
        init=str(init) if methods.base_changing(init) else "",
        base_name=_text(raw.get("base_model_name_or_path")),
        revision=_text(raw.get("revision")),
        task_type=_text(raw.get("task_type")),
        unknown=tuple(sorted(key for key in raw.keys() - known if raw[key])),
    )


def _check_method(name: object) -> None:
    """Refuse every method of PEFT but LoRA."""
    if name == "LORA":
        return
    method = methods.METHODS.get(name) if isinstance(name, str) else None
    if method is None:
        raise UnsupportedError(f"adapters of type {brief(name)} are not supported; only LORA is.")
    raise UnsupportedError(
        f"adapters of the method {method.title} (peft_type {name}) are not supported; only LoRA "
        "and DoRA are.",
        hint=methods.hint(method.merges),
    )


def with_alpha(config: AdapterConfig | None, alpha: float) -> AdapterConfig:
    """The file's settings with the user's alpha, which applies to every module."""
    return AdapterConfig(alpha) if config is None else replace(config, alpha=alpha, alphas={})


def _is_alpha(value: object) -> bool:
    """Whether a scale is usable; NaN is not."""
    return isinstance(value, int | float) and -_MAX_ALPHA < value < _MAX_ALPHA


def _is_rank(value: object) -> bool:
    return type(value) is int and 0 < value < _MAX_RANK


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None
