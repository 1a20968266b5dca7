"""What decides the bytes of a conversion's output, and is recorded in `reshard.json`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from reshard.formats import Selection
from reshard.naming.layouts import Version
from reshard.naming.rewards import ModelType, RewardOptions

SrmFormat = Literal["lightrft", "split", "both"]
Lora = Literal["merge", "adapter", "both"]
Names = Literal["disk", "memory"]

#: The values of `--model-type`, `--srm-format`, `--lora` and `--names`.
MODEL_TYPES = ("vision2seq", "grm", "srm_vl", "srm_al", "critic")
SRM_FORMATS = ("lightrft", "split", "both")
LORA = ("merge", "adapter", "both")
NAMES = ("disk", "memory")


@dataclass(frozen=True, slots=True)
class RewardChoice:
    """What was asked for of a reward model or critic; `model_type` None: found by its heads."""

    model_type: ModelType | None = None
    heads: RewardOptions = field(default_factory=RewardOptions)
    probing_layer: int = -1
    srm_format: SrmFormat = "both"


@dataclass(frozen=True, slots=True)
class LoraChoice:
    """What becomes of adapters. `mode` None: merged, where there is a base."""

    mode: Lora | None = None
    alpha: float | None = None
    config: Path | None = None
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class Options:
    """A conversion's options; paths are as the user gave them."""

    source: Path
    target: Path
    base: Path | None
    to: str
    selection: Selection
    dtype: str
    max_shard_nbytes: int
    exclude_frozen: bool = False
    fill_from_base: bool = False
    allow: tuple[str, ...] = ()
    rewards: RewardChoice = field(default_factory=RewardChoice)
    lora: LoraChoice = field(default_factory=LoraChoice)
    names: Names = "disk"
    transformers_version: Version | None = None

    def stated(self) -> dict[str, Any]:
        """The options as `reshard.json` records them: no paths."""
        version = self.transformers_version
        return {
            "to": self.to,
            "dtype": self.dtype,
            "max_shard_nbytes": self.max_shard_nbytes,
            "exclude_frozen": self.exclude_frozen,
            "fill_from_base": self.fill_from_base,
            "model_type": self.rewards.model_type,
            "srm_format": self.rewards.srm_format,
            "probing_layer": self.rewards.probing_layer,
            "lora": self.lora.mode,
            "prefix": self.selection.prefix,
            "allow": list(self.allow),
            "names": self.names,
            "transformers_version": None if version is None else ".".join(map(str, version)),
        }
