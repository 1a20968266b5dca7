"""The class of a model's backbone: the class of a folder without an output head.

If such a folder's config names the class with a head (`LlamaForCausalLM`), an engine invents the
head: vLLM silently leaves it at random values. Read from transformers 5.23
(models/auto/modeling_auto.py: MODEL_MAPPING_NAMES).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from msgspec import Struct

from reshard.core.findings import Finding
from reshard.core.tensors import Entry
from reshard.errors import listed
from reshard.naming.schema import classes_of, is_backbone, says_tied
from reshard.naming.search import unwrap
from reshard.naming.ties import is_head

_HEADED = ("ForConditionalGeneration", "ForCausalLM", "LMHeadModel")
#: Beginnings of the names of models whose text part has a config of its own (`..._text`) and a
#: backbone named after it.
OF_TEXT = frozenset({
    "CohereCompass", "Dots3Note", "Gemma3", "Gemma3n", "Gemma4", "Gemma4Unified", "Inkling",
    "Inkling2", "Llama4", "MiniMaxM3VL", "Qwen3_5", "Qwen3_5Moe", "Qwen4Exp",
})  # fmt: skip
#: Classes with a head for whose backbone transformers has no separate class.
ALONE = frozenset({
    "Gemma4AssistantForCausalLM", "Gemma4UnifiedAssistantForCausalLM",
    "Llama4ForConditionalGeneration", "PPFormulaNetForConditionalGeneration",
    "Pix2StructForConditionalGeneration", "Qwen2_5OmniForConditionalGeneration",
    "Qwen3OmniMoeForConditionalGeneration", "TrOCRForCausalLM", "XLMWithLMHeadModel",
})  # fmt: skip
#: Those whose backbone begins with another name.
OTHERS = {"MiniMaxM3SparseForConditionalGeneration": "MiniMaxM3VLModel"}


class Bare(Struct, frozen=True):
    """For a model without an output head: the changes of the config, and the finding."""

    patches: Mapping[str, object]
    findings: tuple[Finding, ...]


def has_head(backbone: Mapping[str, Entry]) -> bool:
    """Whether tensors, by any of their names, hold an output head."""
    return any(
        unwrap(name).endswith("lm_head.weight")
        for entry in backbone.values()
        for name in entry.names
    )


def without_head(
    config: Mapping[str, Any], left_out: Iterable[str], classifier: Mapping[str, object] | None
) -> Bare | None:
    """The changes and the finding, where the base's output head is not written.

    `config` is the base's; `classifier` are the changes that make it a classifier, where it becomes
    one. None where there is a head, or the config ties it to the embedding: then no engine invents
    one.
    """
    head = next(filter(is_head, left_out), "")
    if classifier is None and (not head or says_tied(config)):
        return None
    message = "the checkpoint has no output head: the model scores, and is not for generation."
    finding = Finding("no-output-head", message, subject=head)
    if classifier is not None:
        return Bare(classifier, (finding,))
    named = class_without_head(config)
    if named is not None:
        return Bare({"architectures": [named]}, (finding,))
    stated = classes_of(config)
    if not stated or (is_backbone(config) and not config.get("auto_map")):
        return Bare({}, (finding,))
    message = (
        f"config.json names {listed(stated)}, which has an output head, and the folder has none: "
        "an engine that generates with it invents one."
    )
    return Bare({}, (finding, Finding("head-claimed", message, subject="config.json")))


def class_without_head(config: Mapping[str, Any]) -> str | None:
    """The class of the backbone of the class that a config names.

    None where it is not known: a class without an output head, or of code that lies in the model's
    folder.
    """
    named = next(iter(classes_of(config)), "")
    if named in ALONE or config.get("auto_map"):
        return None
    if named in OTHERS:
        return OTHERS[named]
    ending = next((end for end in _HEADED if named.endswith(end)), None)
    if ending is None:
        return None
    stem = named.removesuffix(ending)
    text = stem in OF_TEXT and str(config.get("model_type")).endswith("_text")
    return f"{stem}TextModel" if text else f"{stem}Model"
