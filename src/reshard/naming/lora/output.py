"""What becomes of adapters: updates to merge into the base's tensors, or a folder for PEFT."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from msgspec import Struct

from reshard.core import rearrange
from reshard.core.arithmetic import LowRank, computed
from reshard.core.tensors import Entry
from reshard.errors import NamesError, UnsupportedError
from reshard.naming.lora.find import Adapter, AdapterConfig, Separated, shape_of
from reshard.naming.name_map import NameMap

#: The file names that PEFT looks for.
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"

_PREFIX = "base_model.model."


def updates(
    separated: Separated,
    found: NameMap,
    config: AdapterConfig,
    base: Mapping[str, Entry],
) -> dict[str, Entry]:
    """The update of each adapted tensor, by the base's name.

    `found` maps `separated.entries`, `base` are the base model's own tensors: those that
    the checkpoint does not hold are taken from there.

    Raises `UnsupportedError` for an adapter on a weight that the base stacks or turns, or that is
    tied to another one.
    """
    targets: dict[str, list[str]] = {}
    for target, own in found.origins.items():
        targets.setdefault(own, []).append(target)
    merged = {}
    for module, adapter in separated.adapters.items():
        name = f"{module}.weight"
        target = _only(name, targets.get(name, []), separated, found)
        weight = (
            base[target] if name in separated.absent else separated.entries[name].renamed(target)
        )
        merged[target] = low_rank(adapter, weight, config)
    return merged


def _only(name: str, targets: list[str], separated: Separated, found: NameMap) -> str:
    """The one tensor of the output that an adapted weight is."""
    aliases = separated.entries[name].aliases
    if len(targets) > 1 or aliases or any(stored in targets for stored in found.tied.values()):
        raise UnsupportedError(
            "its adapter would also change the weight that is tied to it.",
            tensor=name,
            hint="Convert with --lora adapter.",
        )
    if not targets:
        raise UnsupportedError(
            "the base stacks, turns or ties this weight, so its adapter cannot be merged.",
            tensor=name,
            hint="Convert with --lora adapter.",
        )
    return targets[0]


def low_rank(adapter: Adapter, base: Entry, config: AdapterConfig) -> Entry:
    """One weight with its update.

    Raises `NamesError` where the shapes do not make the weight's, `UnsupportedError` for DoRA on
    a module that keeps its weight transposed.
    """
    left, right = adapter.b, adapter.a
    made, shape = shape_of(adapter), base.spec.shape
    # transformers' Conv1D (GPT-2) keeps [in, out]: the only modules with a reversed shape.
    turned = not adapter.embedding and (config.fan_in_fan_out or made == shape[::-1] != shape)
    if adapter.embedding or turned:
        left, right = rearrange.transpose(adapter.a, 0, 1), rearrange.transpose(adapter.b, 0, 1)
        made = (left.spec.shape[0], right.spec.shape[1])
    if made != shape:
        raise NamesError(f"the weight is {shape}, its adapter makes {made}.", tensor=adapter.module)
    if turned and adapter.magnitude is not None:
        raise UnsupportedError("DoRA on a transposed weight is not handled.", tensor=adapter.module)
    scaling = config.scaling(adapter.module, adapter.rank)
    return computed(LowRank(base, left, right, scaling, adapter.magnitude), base)


class AdapterFolder(Struct, frozen=True):
    """What an adapter folder holds: `adapter_model.safetensors` and `adapter_config.json`."""

    tensors: Mapping[str, Entry]
    config: Mapping[str, Any]


def adapter_folder(
    separated: Separated, prefix: str, config: AdapterConfig, base_name: str | None = None
) -> AdapterFolder:
    """The adapters as a folder that `PeftModel.from_pretrained` loads.

    `prefix` is what the fit stripped: module names are those of the live base model that the
    checkpoint was trained with. `base_name` is recorded as the base model's name.
    """
    tensors: dict[str, Entry] = {}

    def keep(name: str, entry: Entry) -> None:
        key = _PREFIX + name.removeprefix(prefix)
        tensors[key] = entry.renamed(key)

    for module, adapter in separated.adapters.items():
        a, b = ("lora_embedding_A", "lora_embedding_B") if adapter.embedding else (
            "lora_A.weight", "lora_B.weight")  # fmt: skip
        keep(f"{module}.{a}", adapter.a)
        keep(f"{module}.{b}", adapter.b)
        if adapter.magnitude is not None:
            keep(f"{module}.lora_magnitude_vector", adapter.magnitude)
    for name, entry in separated.entries.items():
        if any(name.startswith(f"{module}.") for module in separated.saved):
            keep(name, entry)
    return AdapterFolder(tensors, _folder_config(separated, prefix, config, base_name))


def _folder_config(
    separated: Separated, prefix: str, config: AdapterConfig, base_name: str | None
) -> dict[str, Any]:
    ranks = {m.removeprefix(prefix): a.rank for m, a in separated.adapters.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    saved = [module.removeprefix(prefix) for module in separated.saved]
    return {
        "base_model_name_or_path": base_name,
        "peft_type": "LORA",
        "task_type": None,
        "inference_mode": True,
        "r": rank,
        "rank_pattern": {m: r for m, r in ranks.items() if r != rank},
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "alpha_pattern": dict(config.alphas),
        "use_rslora": config.rslora,
        "use_dora": any(a.magnitude is not None for a in separated.adapters.values()),
        "fan_in_fan_out": config.fan_in_fan_out,
        "target_modules": _target_modules(set(ranks), separated, prefix),
        "modules_to_save": saved or None,
        "bias": "none",
        "lora_dropout": 0.0,
    }


def _target_modules(adapted: set[str], separated: Separated, prefix: str) -> list[str]:
    """The modules' last names where these select exactly the adapted ones, else full names."""
    every = {
        name.removeprefix(prefix).removesuffix(".weight")
        for name, entry in separated.entries.items()
        if name.endswith(".weight") and len(entry.spec.shape) == 2
    }
    short = {module.rpartition(".")[2] for module in adapted}
    selected = {module for module in every if module.rpartition(".")[2] in short}
    # Where the checkpoint holds no base weights, the modules that were left alone are not known.
    return sorted(short if selected == adapted and not separated.absent else adapted)
