"""Adapters as a folder that PEFT loads, and what other programs make of such a folder.

adapter_model.safetensors   base_model.model.<module>.lora_A.weight, ...; no adapter's name
adapter_config.json         the settings, the base's name, the task
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct

from reshard.core.findings import Finding
from reshard.core.regex import regex
from reshard.core.tensors import Entry
from reshard.naming.lora.config import NAME, AdapterConfig
from reshard.naming.lora.find import PREFIX, Separated
from reshard.storage.paths import absolute

#: The file names that PEFT looks for.
WEIGHTS = "adapter_model.safetensors"
CONFIG = NAME

# A repository's name on the hub, with its owner; it is not a path on one machine.
_REPOSITORY = regex(r"[A-Za-z0-9][\w.\-]*/[\w.\-]+")
# The folder of a snapshot in the Hugging Face cache: models--owner--name/snapshots/<revision>.
_CACHED = regex(r"models--([A-Za-z0-9][\w.\-]*?)--([\w.\-]+)")
# The ends of classes' names -> PEFT's task type (peft/utils/peft_types.py).
_TASKS = (
    ("ForCausalLM", "CAUSAL_LM"),
    ("LMHeadModel", "CAUSAL_LM"),
    ("ForSequenceClassification", "SEQ_CLS"),
    ("ForTokenClassification", "TOKEN_CLS"),
    ("ForQuestionAnswering", "QUESTION_ANS"),
)
#: vLLM 0.33's default of --max-lora-rank.
VLLM_RANK = 16
_VLLM_SAVED = ("score", "classifier")


class Named(Struct, frozen=True):
    """What an adapter folder says of its base: name or path, task type, class."""

    base: str | None = None
    task_type: str | None = None
    auto_mapping: Mapping[str, str] | None = None
    revision: str | None = None


class AdapterFolder(Struct, frozen=True):
    """What an adapter folder holds: `adapter_model.safetensors` and `adapter_config.json`."""

    tensors: Mapping[str, Entry]
    config: Mapping[str, Any]


def named(config: AdapterConfig, base: Path, base_config: Mapping[str, Any]) -> Named:
    """How the folder names its base and task: as the run's own config does, if that is usable.

    A path in the run's config is a path on the machine of the run. So the repository's name is
    used, from the run, the Hugging Face cache or the base's config, else the base's folder.
    """
    cached = next((m for part in base.parts if (m := _CACHED.fullmatch(part))), None)
    stated = (
        config.base_name,
        f"{cached[1]}/{cached[2]}" if cached else None,
        base_config.get("_name_or_path"),
    )
    name = next((n for n in stated if isinstance(n, str) and _REPOSITORY.fullmatch(n)), None)
    revision = config.revision if name is not None and name == config.base_name else None
    architectures = base_config.get("architectures")
    class_ = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    task = config.task_type or _task(class_, base_config)
    mapping = None
    if task is None and class_ and "auto_map" not in base_config:
        # PEFT's AutoPeftModel builds the class that is named here if no task says which.
        mapping = {"base_model_class": class_, "parent_library": "transformers"}
    return Named(name or str(absolute(base)), task, mapping, revision)


def _task(class_: str, config: Mapping[str, Any]) -> str | None:
    """PEFT's task type of a model class; None where PEFT has none, as for vision-language
    models."""
    if config.get("is_encoder_decoder") is True and class_.endswith("ForConditionalGeneration"):
        return "SEQ_2_SEQ_LM"
    return next((task for end, task in _TASKS if class_.endswith(end)), None)


def adapter_folder(
    separated: Separated, prefix: str, config: AdapterConfig, names: Named | None = None
) -> AdapterFolder:
    """The adapters as a folder that `PeftModel.from_pretrained` loads.

    `prefix` is what the fit stripped: module names are those of the loaded base model that the
    checkpoint was trained with.
    """
    tensors: dict[str, Entry] = {}

    def keep(name: str, entry: Entry) -> None:
        key = PREFIX + name.removeprefix(prefix)
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
    return AdapterFolder(tensors, _folder_config(separated, prefix, config, names or Named()))


def _folder_config(
    separated: Separated, prefix: str, config: AdapterConfig, names: Named
) -> dict[str, Any]:
    ranks = {m.removeprefix(prefix): a.rank for m, a in separated.adapters.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    saved = [module.removeprefix(prefix) for module in separated.saved]
    return {
        "auto_mapping": None if names.auto_mapping is None else dict(names.auto_mapping),
        "base_model_name_or_path": names.base,
        "revision": names.revision,
        "peft_type": "LORA",
        "task_type": names.task_type,
        "inference_mode": True,
        "r": rank,
        "rank_pattern": {_exactly(m, ranks): r for m, r in ranks.items() if r != rank},
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


def _exactly(module: str, modules: Mapping[str, int]) -> str:
    """A module's name as a pattern that no other module's name ends with."""
    return f"^{module}" if any(other.endswith(f".{module}") for other in modules) else module


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


def findings(config: Mapping[str, Any], ranks: tuple[int, ...]) -> list[Finding]:
    """What a user of an adapter folder should know: where its base is, which engine refuses it.

    Read off vLLM 0.33 (vllm/lora/peft_helper.py) and llama.cpp (convert_lora_to_gguf.py).
    """
    notes = []
    base = config["base_model_name_or_path"]
    if isinstance(base, str) and not is_repository(base):
        message = f"adapter_config.json names the base by its folder, {base}."
        notes.append(Finding("adapter-base-folder", message))
    refused = _refused_by_engines(config)
    if refused:
        message = f"vLLM and llama.cpp refuse such an adapter: it has {', '.join(refused)}."
        notes.append(Finding("adapter-not-served", message))
    elif max(ranks) > VLLM_RANK:
        message = f"vLLM takes adapters of rank {VLLM_RANK} by default, and this has {max(ranks)}."
        fix = f"Start vLLM with --max-lora-rank {allowed_rank(max(ranks))}."
        notes.append(Finding("adapter-rank-for-vllm", message, fix=fix))
    misread = [
        ("alpha_pattern", "sglang and llama.cpp scale every module by the one lora_alpha"),
        ("rank_pattern", "sglang scales every module as if it had the one rank"),
        ("use_rslora", "sglang and llama.cpp scale by lora_alpha / r, as without use_rslora"),
    ]
    for key, what in misread:
        if config[key]:
            message = f"the adapter has {key}: {what}, silently."
            notes.append(Finding("adapter-scales-differ", message))
    return notes


def _refused_by_engines(config: Mapping[str, Any]) -> list[str]:
    """What vLLM refuses. llama.cpp refuses every module saved in full, a classifier's head too."""
    refused = ["DoRA"] if config["use_dora"] else []
    saved = saved_refused(config)
    if saved:
        refused.append(f"modules_to_save ({', '.join(saved)})")
    return refused


def saved_refused(config: Mapping[str, Any]) -> list[str]:
    """The modules saved in full that vLLM does not take; a file's setting may be anything."""
    saved = config.get("modules_to_save")
    return [str(m) for m in saved if m not in _VLLM_SAVED] if isinstance(saved, list) else []


def is_repository(base: object) -> bool:
    """Whether a base is named as on the hub, and not by a folder of one machine."""
    return isinstance(base, str) and _REPOSITORY.fullmatch(base) is not None


def allowed_rank(rank: int) -> int:
    """The smallest value of vLLM's --max-lora-rank that permits a rank."""
    return next((n for n in (8, 16, 32, 64, 128, 256, 320, 512) if n >= rank), rank)
