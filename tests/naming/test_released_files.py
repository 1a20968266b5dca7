"""Files of the hub that no transformers of today writes, each as a table of names and shapes."""

from __future__ import annotations

import pytest

from reshard.core.tensors import Shape
from reshard.errors import NamesError
from reshard.naming import to_memory
from tests.naming import tables
from tests.naming.tables import fit
from tests.naming.test_every_model import same

Shapes = dict[str, Shape]

# openai-community/gpt2: saved from GPT2Model, with the causal masks of its time.
GPT2: Shapes = {
    "wte.weight": (9, 4),
    "wpe.weight": (6, 4),
    "h.0.ln_1.weight": (4,),
    "h.0.attn.bias": (1, 1, 6, 6),
    "h.0.attn.c_attn.weight": (4, 12),
    "ln_f.weight": (4,),
}
GPT2_RUN: Shapes = {
    **{f"transformer.{name}": shape for name, shape in GPT2.items() if name != "h.0.attn.bias"},
    "lm_head.weight": (9, 4),
}
GPT2_CONFIG = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}

# google-bert/bert-base-uncased: norms by TensorFlow's names.
BERT: Shapes = {
    "bert.embeddings.word_embeddings.weight": (9, 4),
    "bert.embeddings.LayerNorm.gamma": (4,),
    "bert.embeddings.LayerNorm.beta": (4,),
    "bert.embeddings.position_ids": (1, 6),
    "cls.predictions.bias": (9,),
    "cls.predictions.transform.LayerNorm.gamma": (4,),
    "cls.predictions.transform.LayerNorm.beta": (4,),
}
BERT_RUN: Shapes = {
    "bert.embeddings.word_embeddings.weight": (9, 4),
    "bert.embeddings.LayerNorm.weight": (4,),
    "bert.embeddings.LayerNorm.bias": (4,),
    "cls.predictions.bias": (9,),
    "cls.predictions.decoder.bias": (9,),
    "cls.predictions.decoder.weight": (9, 4),
    "cls.predictions.transform.LayerNorm.weight": (4,),
    "cls.predictions.transform.LayerNorm.bias": (4,),
}
BERT_CONFIG = {"model_type": "bert", "architectures": ["BertForMaskedLM"]}

# DeepSeek-V3: the layer after the last predicts more tokens; no loaded model holds it.
DEEPSEEK: Shapes = {
    "model.embed_tokens.weight": (9, 4),
    "model.layers.0.mlp.up_proj.weight": (6, 4),
    "model.norm.weight": (4,),
    "lm_head.weight": (9, 4),
    "model.layers.1.mlp.up_proj.weight": (6, 4),
    "model.layers.1.eh_proj.weight": (4, 8),
}
DEEPSEEK_CONFIG = {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"],
                   "num_hidden_layers": 1, "num_nextn_predict_layers": 1,
                   "tie_word_embeddings": False}  # fmt: skip
EXTRA = ("model.layers.1.mlp.up_proj.weight", "model.layers.1.eh_proj.weight")


def test_files_saved_from_a_backbone() -> None:
    found = fit(tables.entries(GPT2_RUN), tables.schema(GPT2, GPT2_CONFIG), equal=same)
    assert found.matching.filled == ("h.0.attn.bias",)
    assert {*found.entries, *found.matching.filled} == GPT2.keys()
    assert tables.origin(found.entries["h.0.ln_1.weight"]) == "transformer.h.0.ln_1.weight"
    loaded = to_memory(tables.entries(GPT2), GPT2_CONFIG)
    assert loaded.keys() - {"transformer.h.0.attn.bias"} == GPT2_RUN.keys()
    assert tables.origin(loaded["lm_head.weight"]) == "wte.weight"


def test_a_backbone_that_was_trained_by_itself() -> None:
    run = {name: shape for name, shape in GPT2.items() if name != "h.0.attn.bias"}
    found = fit(tables.entries(run, "module."), tables.schema(GPT2, GPT2_CONFIG), equal=same)
    assert found.entries.keys() == run.keys()
    config = {**GPT2_CONFIG, "architectures": ["GPT2Model"]}
    assert to_memory(tables.entries(run), config).keys() == run.keys()


def test_the_names_of_tensorflow() -> None:
    found = fit(tables.entries(BERT_RUN), tables.schema(BERT, BERT_CONFIG), equal=same)
    assert found.entries.keys() | {"bert.embeddings.position_ids"} == BERT.keys()
    gamma = found.entries["bert.embeddings.LayerNorm.gamma"]
    assert tables.origin(gamma) == "bert.embeddings.LayerNorm.weight"
    loaded = to_memory(tables.entries(BERT), BERT_CONFIG)
    assert loaded.keys() - {"bert.embeddings.position_ids"} == BERT_RUN.keys()
    assert tables.origin(loaded["cls.predictions.decoder.bias"]) == "cls.predictions.bias"


@pytest.mark.parametrize("extra", [EXTRA, ("mtp.fc.weight", "mtp.layers.0.norm.weight")])
def test_layers_that_predict_more_tokens(extra: tuple[str, ...]) -> None:
    run = {name: shape for name, shape in DEEPSEEK.items() if name not in EXTRA}
    base = {**run, **dict.fromkeys(extra, (6, 4))}
    found = fit(tables.entries(run), tables.schema(base, DEEPSEEK_CONFIG), equal=same)
    assert found.entries.keys() == run.keys()
    assert found.matching.filled == extra
    assert "2 tensors of layers that no loaded model holds" in found.findings[0].message
    assert to_memory(tables.entries(base), DEEPSEEK_CONFIG).keys() == run.keys()


def test_a_layer_too_few_is_no_prediction_layer() -> None:
    run = {name: shape for name, shape in DEEPSEEK.items() if ".layers.0." not in name}
    with pytest.raises(NamesError, match=r"model\.layers\.0\.mlp"):
        fit(tables.entries(run), tables.schema(DEEPSEEK, DEEPSEEK_CONFIG), equal=same)


def test_a_tower_that_lost_a_part_of_its_name() -> None:
    """Cohere2-Vision as 4.57 writes it, under 5.6 and later and under older versions."""
    config = {
        "model_type": "cohere2_vision",
        "architectures": ["Cohere2VisionForConditionalGeneration"],
        "vision_config": {"model_type": "siglip_vision_model"},
    }
    old = "model.vision_tower.vision_model.post_layernorm.weight"
    new = "model.vision_tower.post_layernorm.weight"
    for files in (old, new):
        for version, expected in (((4, 57), old), ((5, 23), new)):
            loaded = to_memory(tables.entries({files: (4,)}), config, version)
            assert list(loaded) == [expected]


def test_one_tensor_under_names_that_only_one_side_knows() -> None:
    """A run that stores the encoder's name alone, onto files that store the shared one."""
    base: Shapes = {"shared.weight": (9, 4), "encoder.final_layer_norm.weight": (4,)}
    run: Shapes = {"encoder.embed_tokens.weight": (9, 4), "encoder.final_layer_norm.weight": (4,)}
    found = fit(tables.entries(run), tables.schema(base, {"model_type": "t5"}), equal=same)
    assert tables.origin(found.entries["shared.weight"]) == "encoder.embed_tokens.weight"


def test_copies_that_differ_are_refused() -> None:
    run = {**BERT_RUN}
    with pytest.raises(NamesError, match=r"it differs from 'cls\.predictions\.bias'"):
        fit(tables.entries(run), tables.schema(BERT, BERT_CONFIG),
            equal=lambda one, _: "bias" not in one.spec.name)  # fmt: skip


def test_an_embedding_on_either_side_is_no_copy_of_the_other() -> None:
    """Marian's translators may have two vocabularies; the decoder's was left out of the run."""
    base: Shapes = {
        "model.encoder.embed_tokens.weight": (9, 4),
        "model.decoder.embed_tokens.weight": (9, 4),
    }
    run: Shapes = {"model.encoder.embed_tokens.weight": (9, 4)}
    with pytest.raises(NamesError, match=r"1 of the base are not in the checkpoint"):
        fit(tables.entries(run), tables.schema(base, {"model_type": "marian"}), equal=same)
