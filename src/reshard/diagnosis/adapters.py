"""Check whether an inference engine loads an adapter folder as PEFT saves it.

Read off vLLM 0.33 (vllm/lora/peft_helper.py), sglang 0.5.23 (srt/lora), llama.cpp
(convert_lora_to_gguf.py) and mlx-lm 0.32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct

from reshard.containers import safetensors
from reshard.core.findings import Finding
from reshard.core.tensors import TensorSpec
from reshard.diagnosis.engines import ENGINES, EngineName
from reshard.errors import listed
from reshard.naming.lora.folder import (
    CONFIG,
    VLLM_RANK,
    WEIGHTS,
    allowed_rank,
    is_repository,
    saved_refused,
)
from reshard.storage import strict_json
from reshard.storage.local import Sources, child
from reshard.storage.paths import is_folder, listing

# Inits that leave the base's weights as they are, so that the adapter alone is the update (vLLM).
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
_MERGE = "Merge it: reshard convert DIR OUT --base HF_DIR --fill-from-base."


class Adapter(Struct, frozen=True):
    """An adapter folder: its settings, and its tensors by name."""

    settings: Mapping[str, Any]
    tensors: Mapping[str, TensorSpec]

    @property
    def rank(self) -> int:
        """The largest rank."""
        shapes = [s.shape for name, s in self.tensors.items() if ".lora_A." in name and s.shape]
        return max((shape[0] for shape in shapes), default=0)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    there = {file.name for file in listing(folder)} if is_folder(folder) else set()
    weights = {name for name in there if name.endswith(".safetensors")}
    return weights == {WEIGHTS} and CONFIG in there


def read(folder: Path, sources: Sources) -> Adapter:
    """Read an adapter folder's settings and header. Raises `FormatError` where they are broken."""
    source = sources.open(child(folder, CONFIG, store=True))
    settings = strict_json.read_object(source, max_nbytes=strict_json.MAX_INDEX)
    file = safetensors.read(sources.open(child(folder, WEIGHTS, store=True)))
    return Adapter(settings, {name: spec for name, (spec, _) in file.tensors.items()})


def examine(adapter: Adapter, engine: EngineName) -> tuple[Finding, ...]:
    """What the engine does not take of an adapter, or takes otherwise than PEFT."""
    return tuple(
        Finding("engine-adapter", f"{ENGINES[engine].title} {what}.", subject=CONFIG, fix=fix)
        for what, fix in _FACTS[engine](adapter)
    )


def _vllm(adapter: Adapter) -> Iterator[tuple[str, str]]:
    settings = adapter.settings
    refused = [name for name, key in (("DoRA", "use_dora"), ("lora_bias", "lora_bias"))
               if settings.get(key)]  # fmt: skip
    if settings.get("bias", "none") != "none":
        refused.append("trained biases")
    saved = saved_refused(settings)
    if saved:
        refused.append(f"modules_to_save ({listed(saved)})")
    init = settings.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
        refused.append(f"init_lora_weights {init!r}, which changes the base")
    if refused:
        yield f"refuses an adapter with {', '.join(refused)}", _MERGE
    if adapter.rank > VLLM_RANK:
        fix = f"Start vLLM with --max-lora-rank {allowed_rank(adapter.rank)}."
        yield f"takes rank {VLLM_RANK} by default, and this adapter has {adapter.rank}", fix


def _sglang(adapter: Adapter) -> Iterator[tuple[str, str]]:
    if adapter.settings.get("use_dora"):
        yield "refuses an adapter with DoRA", _MERGE
    yield from _one_scale(adapter, ("alpha_pattern", "rank_pattern", "use_rslora"))


def _llama_cpp(adapter: Adapter) -> Iterator[tuple[str, str]]:
    others = sorted(n for n in adapter.tensors if ".lora_A." not in n and ".lora_B." not in n)
    if others:
        yield f"takes lora_A and lora_B only, and the adapter has {listed(others, 2)}", _MERGE
    yield from _one_scale(adapter, ("alpha_pattern", "use_rslora"))
    if not is_repository(adapter.settings.get("base_model_name_or_path")):
        yield (
            "finds the base by a repository's name, which base_model_name_or_path is not",
            "Pass --base HF_DIR to convert_lora_to_gguf.py.",
        )


def _one_scale(adapter: Adapter, keys: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """What an engine that scales every module by lora_alpha / r overlooks."""
    there = [key for key in keys if adapter.settings.get(key)]
    if there:
        yield f"silently scales as if without {', '.join(there)}", _MERGE


def _mlx(adapter: Adapter) -> Iterator[tuple[str, str]]:
    yield (
        f"reads adapters of its own format only, and these {len(adapter.tensors)} are PEFT's",
        (_MERGE),
    )


_FACTS = {"vllm": _vllm, "sglang": _sglang, "llama.cpp": _llama_cpp, "mlx": _mlx}
