"""Models of many families, as the installed transformers saves them, and back into its memory.

Real classes with tiny configs: what `save_pretrained` writes is the released model, `state_dict`
is the run. Every tensor of either is made of the other's, bit for bit. The families whose tables
lie in `layouts/` are not repeated here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reshard.core.tensors import Entry
from reshard.errors import UnsupportedError
from reshard.naming import parse_version, to_memory
from tests.naming import tables
from tests.naming.make_layouts import CLIP, EXPERTS, LLAVA, SIGLIP, UNTIED, build, saved
from tests.naming.tables import fit

INSTALLED = parse_version("5.23")

GPT = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
BERT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "embedding_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
BART = {
    "vocab_size": 96,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 64,
}
WHISPER = {**BART, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16,
           "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
           "decoder_start_token_id": 1}  # fmt: skip
T5 = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 1, "num_heads": 4}
MLA = {"q_lora_rank": 10, "kv_lora_rank": 6, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
       "v_head_dim": 8, "num_key_value_heads": 4}  # fmt: skip
ROUTED = {**UNTIED, "moe_intermediate_size": 12, "n_routed_experts": 4, "num_experts_per_tok": 2,
          "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}  # fmt: skip
MIXED = {**UNTIED, "num_local_experts": 3, "num_experts_per_tok": 2}
VIT = {"hidden_size": 24, "intermediate_size": 28, "num_hidden_layers": 1, "image_size": 16,
       "num_attention_heads": 4, "patch_size": 8}  # fmt: skip

#: (model class, config class, keyword arguments of the config)
MODELS: list[tuple[str, str, dict[str, Any]]] = [
    # embeddings that the module holds twice or three times
    ("T5ForConditionalGeneration", "T5Config", T5),
    ("T5EncoderModel", "T5Config", T5),
    ("T5ForSequenceClassification", "T5Config", T5),
    ("MT5ForConditionalGeneration", "MT5Config", T5),
    ("BartForConditionalGeneration", "BartConfig", BART),
    ("BartModel", "BartConfig", BART),
    ("BartForSequenceClassification", "BartConfig", {**BART, "num_labels": 5}),
    ("BartForCausalLM", "BartConfig", BART),
    ("PegasusForConditionalGeneration", "PegasusConfig", BART),
    ("WhisperForConditionalGeneration", "WhisperConfig", WHISPER),
    # heads and backbones by other names
    ("OPTForCausalLM", "OPTConfig", {**BERT, "word_embed_proj_dim": 32, "ffn_dim": 40}),
    ("BloomForCausalLM", "BloomConfig", {**GPT, "hidden_size": 32}),
    ("FalconForCausalLM", "FalconConfig", BERT),
    ("GPT2LMHeadModel", "GPT2Config", GPT),
    ("GPTJForCausalLM", "GPTJConfig", {**GPT, "rotary_dim": 4}),
    ("GPTNeoXForCausalLM", "GPTNeoXConfig", BERT),
    ("MambaForCausalLM", "MambaConfig", {**BERT, "state_size": 4}),
    # a head's bias that the module holds twice
    ("BertForMaskedLM", "BertConfig", BERT),
    ("BertForPreTraining", "BertConfig", BERT),
    ("BertForSequenceClassification", "BertConfig", {**BERT, "num_labels": 5}),
    ("RobertaForMaskedLM", "RobertaConfig", BERT),
    ("DistilBertForMaskedLM", "DistilBertConfig", {"vocab_size": 96, "dim": 32, "n_heads": 4,
                                                   "hidden_dim": 40, "n_layers": 1}),
    ("ElectraForMaskedLM", "ElectraConfig", BERT),
    ("AlbertForMaskedLM", "AlbertConfig", BERT),
    ("DebertaV2ForMaskedLM", "DebertaV2Config", BERT),
    ("ModernBertForMaskedLM", "ModernBertConfig", {**BERT, "bos_token_id": 1, "eos_token_id": 2,
                                                   "cls_token_id": 1, "sep_token_id": 2}),
    # experts
    ("Glm4MoeLiteForCausalLM", "Glm4MoeLiteConfig", {**ROUTED, **MLA}),
    ("MiniMaxM2ForCausalLM", "MiniMaxM2Config", MIXED),
    ("GraniteMoeForCausalLM", "GraniteMoeConfig", MIXED),
    ("OlmoeForCausalLM", "OlmoeConfig", EXPERTS),
    ("JambaForCausalLM", "JambaConfig", {**UNTIED, "num_experts": 3, "mamba_d_state": 4,
                                         "use_mamba_kernels": False}),
    ("Qwen3MoeForSequenceClassification", "Qwen3MoeConfig", {**EXPERTS, "num_labels": 4}),
    ("MixtralModel", "MixtralConfig", MIXED),
    # towers, and backbones of models with several parts
    ("ViTModel", "ViTConfig", VIT),
    ("CLIPVisionModel", "CLIPVisionConfig", CLIP),
    ("LlavaModel", "LlavaConfig", LLAVA),
    ("Cohere2VisionForConditionalGeneration", "Cohere2VisionConfig",
     {"text_config": {**UNTIED, "model_type": "cohere2"}, "vision_config": SIGLIP,
      "alignment_intermediate_size": 48}),
]  # fmt: skip


def same(one: Entry, other: Entry) -> bool:
    """No two tensors of a model have one shape and are compared but those that share storage."""
    return one.spec.shape == other.spec.shape


@pytest.mark.parametrize("name", [name for name, _, _ in MODELS])
def test_both_ways(name: str, tmp_path: Path) -> None:
    (arguments,) = (row[1:] for row in MODELS if row[0] == name)
    model = build(name, *arguments)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    disk = {key: value.numpy() for key, value in saved(tmp_path).items()}
    memory = {key: value.numpy() for key, value in model.state_dict().items()}

    found = fit(
        tables.entries({key: value.shape for key, value in memory.items()}, "module."),
        tables.schema({key: value.shape for key, value in disk.items()}, config),
        equal=same,
    )
    assert (found.matching.filled, found.matching.unexpected, dict(found.config_patches)) == (
        (),
        (),
        {},
    )
    hold(found.entries, tables.files(memory, "module."), disk)

    base = tables.entries({key: value.shape for key, value in disk.items()})
    hold(to_memory(base, config, INSTALLED), tables.files(disk), memory)


def hold(found: Any, content: Any, expected: dict[str, tables.Array]) -> None:
    """The entries are the expected arrays, name for name and bit for bit."""
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        np.testing.assert_array_equal(tables.values(found[key], content), array)


def test_what_is_not_known_is_refused() -> None:
    """Kimi's loaded models hold permuted thirds of the files' projections."""
    config = {"model_type": "kimi_k25", "architectures": ["KimiK25ForConditionalGeneration"]}
    base = tables.entries({"language_model.model.embed_tokens.weight": (8, 2)})
    with pytest.raises(UnsupportedError, match=r"kimi_k25 as models that split, join, permute"):
        to_memory(base, config, INSTALLED)


def test_the_installed_version_is_the_newest_known() -> None:
    import transformers

    assert parse_version(transformers.__version__)[:2] == INSTALLED
    assert torch.__version__


def test_a_class_that_computes_its_positions_is_refused() -> None:
    config = {"model_type": "marian", "architectures": ["MarianMTModel"]}
    base = tables.entries({"model.shared.weight": (8, 2)})
    with pytest.raises(UnsupportedError, match=r"4\.57 loads MarianMTModel"):
        to_memory(base, config, (4, 57))
    assert to_memory(base, {**config, "architectures": ["MarianModel"]}).keys() == base.keys()
