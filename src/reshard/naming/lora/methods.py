"""The methods of PEFT, by name: the one that reshard merges, and the others as errors name them.

Read off PEFT 0.21: utils/peft_types.py (the methods), mapping.py (the first letters of their
parameters), tuners/lora/config.py (the settings) and tuners/lora/layer.py (what an initialisation
does to the base). `tests/naming/test_methods.py` compares every table with the installed PEFT.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from msgspec import Struct

from reshard.naming.scanning import any_contains, batched

# Names whose parts are compared at once: those of 40,000 may be 4 million.
_AT_ONCE = 4096


class Method(Struct, frozen=True):
    """A method that reshard does not merge: its title, and the prefix that marks its tensors'
    names. `merges`: PEFT itself can merge it into the weights."""

    title: str
    prefix: str
    merges: bool = True


#: `peft_type` in adapter_config.json -> the method; LORA alone is merged.
METHODS: dict[str, Method] = {
    "ADALORA": Method("AdaLoRA", "lora_E"),
    "ADAMSS": Method("AdaMSS", "adamss_"),
    "ADAPTION_PROMPT": Method("adaption prompt", "adaption_prompt", merges=False),
    "BEFT": Method("BEFT", "beft_"),
    "BOFT": Method("BOFT", "boft_"),
    "C3A": Method("C3A", "c3a_"),
    "CARTRIDGE": Method("Cartridge", "cartridge_", merges=False),
    "CPT": Method("CPT", "cpt_", merges=False),
    "DEFT": Method("DEFT", "deft_"),
    "DELORA": Method("DeLoRA", "delora_"),
    "FOURIERFT": Method("FourierFT", "fourierft_"),
    "FROD": Method("FRoD", "frod_"),
    "GLORA": Method("GLoRA", "glora_"),
    "GRALORA": Method("GraLoRA", "gralora_"),
    "HIRA": Method("HiRA", "hira_"),
    "HRA": Method("HRA", "hra_"),
    "IA3": Method("IA3", "ia3_"),
    "LILY": Method("Lily", "lily_", merges=False),
    "LN_TUNING": Method("LN tuning", "ln_tuning_"),
    "LOHA": Method("LoHa", "hada_"),
    "LOKR": Method("LoKr", "lokr_"),
    "MISS": Method("MiSS", "miss_"),
    "MULTITASK_PROMPT_TUNING": Method(
        "multitask prompt tuning", "multitask_prompt_tuning_", merges=False
    ),
    "OFT": Method("OFT", "oft_"),
    "OSF": Method("OSF", "osf_"),
    "P_TUNING": Method("P-tuning", "p_tuning_", merges=False),
    "PEANUT": Method("PEANuT", "peanut_"),
    "POLY": Method("Poly", "poly_", merges=False),
    "PREFIX_TUNING": Method("prefix tuning", "prefix_tuning_", merges=False),
    "PROMPT_TUNING": Method("prompt tuning", "prompt_tuning_", merges=False),
    "PSOFT": Method("PSOFT", "psoft_"),
    "PVERA": Method("PVeRA", "pvera_"),
    "RANDLORA": Method("RandLoRA", "randlora_"),
    "ROAD": Method("RoAd", "road_"),
    "SHADOW": Method("Shadow", "shadow_", merges=False),
    "SHIRA": Method("SHiRA", "shira_"),
    "SUPERTUNING": Method("SuperTuning", "supertuning_"),
    "TINYLORA": Method("TinyLoRA", "tinylora_"),
    "TRAINABLE_TOKENS": Method("trainable tokens", "trainable_tokens"),
    "UNILORA": Method("Uni-LoRA", "unilora_"),
    "VBLORA": Method("VB-LoRA", "vblora_"),
    "VERA": Method("VeRA", "vera_"),
    "WAVEFT": Method("WaveFT", "waveft_"),
    "XLORA": Method("X-LoRA", "xlora_", merges=False),
}
#: Prompt learning's name for its one tensor, or for the module that makes it.
PROMPTS = ("prompt_encoder", "prompt_embeddings")


class Setting(Struct, frozen=True):
    """A setting of LoRA that makes it something other than `W + B A s`.

    `part` is the prefix that marks its tensors' names; None: its tensors have the usual names, or
    names that do not show it. `merges`: PEFT itself can merge it.
    """

    title: str
    part: str | None = None
    merges: bool = True


#: Settings of LoRA that are refused where they are set.
REFUSED_SETTINGS: dict[str, Setting] = {
    "alora_invocation_tokens": Setting("aLoRA", merges=False),
    "arrow_config": Setting("Arrow", "lora_arrow", merges=False),
    "kasa_config": Setting("KaSA", "lora_diag"),
    "layer_replication": Setting("layer replication"),
    "lora_bias": Setting("a bias of their own"),
    "megatron_config": Setting("Megatron's parallel layers", merges=False),
    "target_parameters": Setting("parameters of a module"),
    "trainable_token_indices": Setting("trainable tokens", "trainable_tokens"),
    "use_bdlora": Setting("BD-LoRA", merges=False),
    "use_qalora": Setting("QALoRA", merges=False),
}
#: Settings that a merge or an adapter folder is made from.
USED_SETTINGS = frozenset({
    "alpha_pattern", "base_model_name_or_path", "bias", "fan_in_fan_out", "init_lora_weights",
    "lora_alpha", "peft_type", "r", "rank_pattern", "revision", "task_type", "use_dora",
    "use_rslora",
})  # fmt: skip
#: Settings that change no tensor once training is over: the tensors say the rest.
IDLE_SETTINGS = frozenset({
    "auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout",
    "lora_ga_config", "megatron_core", "modules_to_save", "monteclora_config", "peft_version",
    "qalora_group_size", "runtime_config", "target_modules", "velora_config",
})  # fmt: skip
#: Beginnings of the names of initialisations that subtract the adapter's first update from the
#: base's weights: such an adapter updates `W - B A s`.
BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")

#: The tensors of LoRA and DoRA.
TENSORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
# State of training, which a merge by PEFT leaves out: VeLoRA's projection, MonteCLoRA's sampler.
_TRAINING = frozenset({"lora_velora_embed", "lora_monteclora_sampler"})
#: Parts that PEFT puts into the names of a model that it wraps.
WRAPPING = ("base_layer", "modules_to_save", "original_module")


# What parts of names begin with that belong to some method; nearly no other part does.
_STARTS = (
    "lora_",
    *(method.prefix for method in METHODS.values()),
    *(setting.part for setting in REFUSED_SETTINGS.values() if setting.part is not None),
)


#: One of these is in every name with a part that PEFT might have put there.
SIGNS = (*_STARTS, *WRAPPING, *PROMPTS)


def base_changing(init: object) -> bool:
    """Whether an `init_lora_weights` subtracts the adapter's first update from the base's
    weights."""
    return isinstance(init, str) and init.lower().startswith(BASE_CHANGING)


def is_of_training(parts: Iterable[str]) -> bool:
    """Whether a part of a name marks a tensor that only training uses."""
    return not _TRAINING.isdisjoint(parts)


@lru_cache(4096)
def refused_part(part: str) -> tuple[str, bool] | None:
    """The title of the method that a part of a name belongs to, and whether PEFT can merge it.

    >>> refused_part("lora_diag"), refused_part("lora_A"), refused_part("q_proj")
    (('KaSA', True), None, None)
    >>> refused_part("lora_new")
    ("unknown parts ('lora_new')", True)
    """
    if not part.startswith(_STARTS) or part in TENSORS or part in _TRAINING:
        return None
    for method in METHODS.values():
        if part.startswith(method.prefix):
            return method.title, method.merges
    for setting in REFUSED_SETTINGS.values():
        if setting.part is not None and part.startswith(setting.part):
            return setting.title, setting.merges
    return (f"unknown parts ({part[:40]!r})", True) if part.startswith("lora_") else None


def looks_adapted(part: str) -> bool:
    """Whether PEFT may have put a part into a name: a tensor of an adapter, or a wrapper."""
    return part in TENSORS or part in WRAPPING or part in PROMPTS or part in _TRAINING or (
        refused_part(part) is not None
    )  # fmt: skip


def hint(merges: bool) -> str:
    """What a user can do about an adapter that is not merged here."""
    if merges:
        return "Merge it with PEFT, merge_and_unload(), and convert the model that it then saves."
    return "PEFT cannot merge it either: keep base and adapter, and load both with PEFT."


def parts_of(names: Iterable[str]) -> frozenset[str]:
    """Every part of the names that PEFT might have put there."""
    found: set[str] = set()
    for some in batched(names, _AT_ONCE):
        if any_contains(some, SIGNS):
            found.update(filter(looks_adapted, {part for name in some for part in name.split(".")}))
    return frozenset(found)


# transformers' Conv1D keeps its weight as [in, out]; model type -> the last names of its modules.
_CONV1D = ("c_attn", "c_fc", "c_proj", "q_attn")
_CONV1D_TYPES = ("clvp", "clvp_decoder", "decision_transformer", "gpt2", "imagegpt", "openai-gpt")


def turned_modules(model_type: object) -> tuple[str, ...]:
    """The last names of modules that store their weight transposed, which a square weight does not
    show."""
    return _CONV1D if model_type in _CONV1D_TYPES else ()
