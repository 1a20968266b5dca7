"""The options that determine the bytes of a conversion's output; `reshard.json` records them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

from msgspec import Struct, field
from msgspec.structs import replace

from reshard.core.options import Choice, Flag, Integer, Texts
from reshard.errors import OptionError, brief
from reshard.formats import Selection
from reshard.formats.info import output_formats
from reshard.naming import parse_version
from reshard.naming.layouts import Version
from reshard.naming.lora.config import AdapterConfig
from reshard.naming.rewards import ModelType, Pooling, RewardOptions

SrmFormat = Literal["lightrft", "split", "both"]
Lora = Literal["merge", "adapter", "both"]
Names = Literal["all", "disk", "memory", "hub", "torchtitan"]
Layout = Literal["lightrft", "accelerate", "nested", "torchtitan"]
Engine = Literal["local", "ray"]
To = Literal["hf", "dcp", "megatron", "deepspeed", "meta"]
DTypeChoice = Literal["base", "keep", "float32", "bfloat16", "float16", "fp32", "bf16", "fp16"]
# A name of 300 parts is matched in 50 ms with three `**`, in 8 s with four.
_MAX_WILDCARDS = 3

#: The values of `--model-type`, `--srm-format`, `--lora`, `--names` and `--pooling-method`.
MODEL_TYPES: tuple[ModelType, ...] = ("vision2seq", "grm", "srm_vl", "srm_al", "critic")
SRM_FORMATS: tuple[SrmFormat, ...] = ("lightrft", "split", "both")
LORA: tuple[Lora, ...] = ("merge", "adapter", "both")
NAMES: tuple[Names, ...] = ("all", "disk", "memory", "hub", "torchtitan")
#: Who moves the bytes.
ENGINES: tuple[Engine, ...] = ("local", "ray")
#: Every format's values of `--layout`.
LAYOUTS: tuple[Layout, ...] = ("lightrft", "accelerate", "nested", "torchtitan")
POOLINGS: tuple[Pooling, ...] = ("attn", "last")
#: LightRFT's default probing layer: the input of the last layer.
PROBING_LAYER = -1


class Patterns(Texts, frozen=True):
    """Patterns of names, without so many wildcards that matching one takes minutes."""

    @property
    def words(self) -> str:
        return "a list of patterns"

    def parse(self, value: object) -> tuple[str, ...]:
        patterns = super().parse(value)
        for pattern in patterns:
            if pattern.count("**") > _MAX_WILDCARDS:
                raise OptionError(
                    f"{brief(pattern)} contains `**` more than {_MAX_WILDCARDS} times."
                )
        return patterns


class RewardChoice(Struct, frozen=True):
    """The options for a reward model or critic; `model_type` None: detected by its heads.

    `probing_layer` None: LightRFT's default.
    """

    model_type: ModelType | None = None
    heads: RewardOptions = field(default_factory=RewardOptions)
    probing_layer: int | None = None
    srm_format: SrmFormat = "both"

    @property
    def layer(self) -> int:
        """The probing layer that counts."""
        return PROBING_LAYER if self.probing_layer is None else self.probing_layer


class LoraChoice(Struct, frozen=True):
    """What to do with adapters. `mode` None: merge them, if there is a base.

    They scale by `alpha`, or as the file `config` says; `scaling` is the scaling that a conversion
    found.
    """

    mode: Lora | None = None
    alpha: float | None = None
    config: Path | None = None
    adapter: str | None = None
    scaling: AdapterConfig | None = None

    @property
    def alone(self) -> bool:
        """Whether the adapter is written, and not the model."""
        return self.mode == "adapter"

    @property
    def writes_adapter(self) -> bool:
        """Whether an adapter folder is written."""
        return self.mode in ("adapter", "both")


class Options(Struct, frozen=True):
    """A conversion's options; paths are as the user gave them.

    With `optimizer` the training state is written too, laid out as `layout` says; `hyperparameters`
    is a JSON file of those that the checkpoint does not hold.

    `names` None: all that a loaded model may ask for where the output format can hold them and the
    model's config is at hand, else those on disk.
    """

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
    names: Names | None = None
    transformers_version: Version | None = None
    consumed_samples: int | None = None
    optimizer: bool = False
    layout: str | None = None
    hyperparameters: Path | None = None

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
            "probing_layer": self.rewards.layer,
            "value_head": self.rewards.heads.value_head,
            "lora": self.lora.mode,
            "adapter": self.lora.adapter,
            "prefix": self.selection.prefix,
            "masters": self.selection.masters,
            "allow": list(self.allow),
            "names": self.names,
            "consumed_samples": self.consumed_samples,
            "transformers_version": None if version is None else ".".join(map(str, version)),
            **({"optimizer": True, "layout": self.layout} if self.optimizer else {}),
        }


def unwritten(source: Path, base: Path) -> Options:
    """Options of a conversion that is planned to see what becomes of names, and never carried out.

    Its dtypes are the checkpoint's, its names those of the base's files.
    """
    return Options(source, base, base, "hf", Selection(), "keep", 1, names="disk")


#: Updates whose alpha does not matter: they are counted, or left apart from the weights.
ANY_ALPHA = LoraChoice(alpha=1.0)


def restated(options: Options, stated: Mapping[str, Any], names: Mapping[str, Any]) -> Options:
    """`options` with what the `options` and `names` of a `reshard.json` say of names and values.

    Raises `OptionError`, `TypeError`, `ValueError`, `KeyError` or `AttributeError` where they are
    malformed.
    """
    memory = stated.get("names") == "memory"
    to = stated.get("to")
    # Both decide which names a tensor has, and whether it has several.
    trained = to in output_formats() and (memory or output_formats()[to].naming is not None)
    version = (names if memory else stated).get("transformers_version")
    lora, mode = names.get("lora"), stated.get("lora")
    srm_format = Choice(SRM_FORMATS).parse(stated.get("srm_format", "both"))
    return replace(
        options,
        to=to if trained else options.to,
        exclude_frozen=Flag().parse(stated.get("exclude_frozen", False)),
        fill_from_base=Flag().parse(stated.get("fill_from_base", False)),
        allow=Patterns().parse(stated.get("allow", ())),
        rewards=RewardChoice(
            heads=RewardOptions(value_head=_optional(stated.get("value_head"))),
            probing_layer=Integer().parse(stated.get("probing_layer", -1)),
            srm_format=cast(SrmFormat, srm_format),
        ),
        lora=LoraChoice(
            None if mode is None else cast(Lora, Choice(LORA).parse(mode)),
            adapter=_optional(stated.get("adapter")),
            scaling=None if lora is None else _scaling(lora),
        ),
        names=_stated_names(stated),
        optimizer=Flag().parse(stated.get("optimizer", False)),
        transformers_version=None if version is None else parse_version(_text(version)),
    )


def _stated_names(stated: Mapping[str, Any]) -> Names:
    """The names that a folder has, where another version or trainer gave them; else the files'."""
    names = stated.get("names")
    return cast(Names, names) if names in ("memory", "torchtitan") else "disk"


def _scaling(lora: Mapping[str, Any]) -> AdapterConfig:
    return AdapterConfig(
        float(lora["alpha"]),
        bool(lora["rslora"]),
        {_text(name): float(alpha) for name, alpha in lora["alphas"].items()},
        bool(lora["fan_in_fan_out"]),
    )


def _optional(value: object) -> str | None:
    return None if value is None else _text(value)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return value
