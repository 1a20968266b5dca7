"""The tensors in the released files of each architecture. **A table to extend.**

Read off the modeling files of transformers 4.57 and 5.23, and compared with what their classes save
(`tests/naming/test_architectures.py`). For a model type that is not listed, only its own layers are
compared (`structure.py`).

A block of rows is text, a row a line:

    name                      dimensions   when

`*` in a name is an expert's number. A dimension is a letter of `SIZES`, a number, or `?` for any; a
single `-` stands for any shape at all. `when` is empty where the tensor is always there, `maybe`
where files have it or not, else keys of the config, joined by `&`, that must be true (`key+`: or
not be stated).

Long because it is one table, which is searched as one.
"""

from __future__ import annotations

from msgspec import Struct

Block = str

#: Letter of a dimension -> the config's keys that state it, the first that is there. `Q` and `K`
#: are the widths of all query and key heads, `G` twice an expert's.
SIZES: dict[str, tuple[str, ...]] = {
    "H": ("hidden_size",),
    "I": ("intermediate_size",),
    "D": ("head_dim",),
    "M": ("moe_intermediate_size",),
    "E": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "S": ("shared_expert_intermediate_size",),
    "A": ("q_lora_rank",),
    "B": ("kv_lora_rank",),
}


class Decoder(Struct, frozen=True):
    """A language model: the rows of each layer and those outside, without the prefix `model.`.

    Where an entry of `layer` is a tuple of blocks, a layer has the rows of one of them. `stem` is
    what its class names begin with; its head has a bias where `head_bias` is true.
    """

    model_types: tuple[str, ...]
    stem: str
    layer: tuple[Block | tuple[Block, ...], ...]
    outside: Block = "embed_tokens.weight ? H\nnorm.weight H"
    head_bias: str = "lm_head_bias"


class Tower(Struct, frozen=True):
    """A vision or audio tower: rows of each layer of `layers` and those outside. `count`: the
    config's keys that state how many layers there are."""

    model_types: tuple[str, ...]
    layers: str
    layer: Block
    outside: Block
    count: tuple[str, ...] = ("num_hidden_layers",)


class Composite(Struct, frozen=True):
    """A model of several parts. `text` and `head` precede the decoder's and the head's names;
    `towers` are the prefixes of towers, by the config's section; `outside` the rows beside them."""

    model_types: tuple[str, ...]
    stem: str
    text: str
    head: str
    towers: tuple[tuple[str, str], ...]
    outside: Block = ""


_NORMS = """
input_layernorm.weight            H
post_attention_layernorm.weight   H
"""
_NORMS_AROUND = """
input_layernorm.weight              H
post_attention_layernorm.weight     H
pre_feedforward_layernorm.weight    H
post_feedforward_layernorm.weight   H
"""
_NORMS_WITH_BIAS = """
input_layernorm.weight            H
input_layernorm.bias              H
post_attention_layernorm.weight   H
post_attention_layernorm.bias     H
"""
_ATTENTION = """
self_attn.q_proj.weight   Q H
self_attn.k_proj.weight   K H
self_attn.v_proj.weight   K H
self_attn.o_proj.weight   H Q
"""
_BIASES_OF_QWEN2_MOE = """
self_attn.q_proj.bias   Q   qkv_bias+
self_attn.k_proj.bias   K   qkv_bias+
self_attn.v_proj.bias   K   qkv_bias+
"""
_BIASES_IF_STATED = """
self_attn.q_proj.bias   Q   attention_bias
self_attn.k_proj.bias   K   attention_bias
self_attn.v_proj.bias   K   attention_bias
self_attn.o_proj.bias   H   attention_bias
"""
_BIASES_OF_QWEN2 = """
self_attn.q_proj.bias   Q
self_attn.k_proj.bias   K
self_attn.v_proj.bias   K
"""
_HEAD_NORMS = """
self_attn.q_norm.weight   D
self_attn.k_norm.weight   D
"""
_SINKS = """
self_attn.sinks         ?
self_attn.q_proj.bias   Q   attention_bias+
self_attn.k_proj.bias   K   attention_bias+
self_attn.v_proj.bias   K   attention_bias+
self_attn.o_proj.bias   H   attention_bias+
"""
_LATENT = """
self_attn.kv_a_proj_with_mqa.weight   ? H
self_attn.kv_a_proj_with_mqa.bias     ?     attention_bias
self_attn.kv_a_layernorm.weight       B
self_attn.kv_b_proj.weight            ? B
self_attn.o_proj.weight               H ?
self_attn.o_proj.bias                 H     attention_bias
"""
_LATENT_QUERY = """
self_attn.q_a_proj.weight        A H
self_attn.q_a_proj.bias          A     attention_bias
self_attn.q_a_layernorm.weight   A
self_attn.q_b_proj.weight        ? A
"""
_WHOLE_QUERY = """
self_attn.q_proj.weight   ? H
"""
_MLP = """
mlp.gate_proj.weight   I H
mlp.up_proj.weight     I H
mlp.down_proj.weight   H I
"""
_MLP_BIASES = """
mlp.gate_proj.bias   I   mlp_bias
mlp.up_proj.bias     I   mlp_bias
mlp.down_proj.bias   H   mlp_bias
"""
_EXPERTS = """
mlp.gate.weight                  E H
mlp.experts.*.gate_proj.weight   M H
mlp.experts.*.up_proj.weight     M H
mlp.experts.*.down_proj.weight   H M
"""
_SHARED_EXPERT = """
mlp.shared_expert.gate_proj.weight   S H
mlp.shared_expert.up_proj.weight     S H
mlp.shared_expert.down_proj.weight   H S
mlp.shared_expert_gate.weight        1 H
"""
_SHARED_EXPERTS = """
mlp.shared_experts.gate_proj.weight   ? H
mlp.shared_experts.up_proj.weight     ? H
mlp.shared_experts.down_proj.weight   H ?
"""
_CORRECTION = """
mlp.gate.e_score_correction_bias   E
"""
_SHARED_EXPERTS_BIASES = """
mlp.shared_experts.gate_proj.bias   ?   mlp_bias
mlp.shared_experts.up_proj.bias     ?   mlp_bias
mlp.shared_experts.down_proj.bias   H   mlp_bias
"""
_ERNIE_STATISTICS = """
mlp.moe_statics.e_score_correction_bias   1 E
mlp.shared_experts.gate_proj.weight       ? H   moe_num_shared_experts+
mlp.shared_experts.up_proj.weight         ? H   moe_num_shared_experts+
mlp.shared_experts.down_proj.weight       H ?   moe_num_shared_experts+
mlp.shared_experts.gate_proj.bias         ?     moe_num_shared_experts+&use_bias
mlp.shared_experts.up_proj.bias           ?     moe_num_shared_experts+&use_bias
mlp.shared_experts.down_proj.bias         H     moe_num_shared_experts+&use_bias
mlp.experts.*.gate_proj.bias              M     maybe
mlp.experts.*.up_proj.bias                M     maybe
mlp.experts.*.down_proj.bias              H     maybe
"""
_ERNIE_BIASES = """
self_attn.q_proj.bias   Q   use_bias
self_attn.k_proj.bias   K   use_bias
self_attn.v_proj.bias   K   use_bias
self_attn.o_proj.bias   H   use_bias
"""
_ERNIE_MLP_BIASES = """
mlp.gate_proj.bias   I   use_bias
mlp.up_proj.bias     I   use_bias
mlp.down_proj.bias   H   use_bias
"""
_MIXTRAL_EXPERTS = """
block_sparse_moe.gate.weight           E H
block_sparse_moe.experts.*.w1.weight   I H
block_sparse_moe.experts.*.w2.weight   H I
block_sparse_moe.experts.*.w3.weight   I H
"""
_STACKED_EXPERTS = """
mlp.gate.weight            E H
mlp.experts.gate_up_proj   -
mlp.experts.down_proj      -
"""
_GPT_OSS_EXPERTS = """
mlp.router.weight               E H
mlp.router.bias                 E
mlp.experts.gate_up_proj        -
mlp.experts.gate_up_proj_bias   -
mlp.experts.down_proj           -
mlp.experts.down_proj_bias      -
"""

DECODERS = (
    Decoder(("llama",), "Llama", (_NORMS, _ATTENTION, _BIASES_IF_STATED, _MLP, _MLP_BIASES)),
    Decoder(("mistral",), "Mistral", (_NORMS, _ATTENTION, _MLP)),
    Decoder(("qwen2", "qwen2_vl", "qwen2_5_vl", "qwen2_vl_text", "qwen2_5_vl_text"), "Qwen2",
            (_NORMS, _ATTENTION, _BIASES_OF_QWEN2, _MLP)),
    Decoder(("qwen3", "qwen3_vl_text"), "Qwen3",
            (_NORMS, _ATTENTION, _BIASES_IF_STATED, _HEAD_NORMS, _MLP)),
    Decoder(("gemma",), "Gemma", (_NORMS, _ATTENTION, _BIASES_IF_STATED, _MLP)),
    Decoder(("gemma2",), "Gemma2", (_NORMS_AROUND, _ATTENTION, _BIASES_IF_STATED, _MLP)),
    Decoder(("gemma3_text",), "Gemma3",
            (_NORMS_AROUND, _ATTENTION, _BIASES_IF_STATED, _HEAD_NORMS, _MLP)),
    Decoder(("mixtral",), "Mixtral", (_NORMS, _ATTENTION, _MIXTRAL_EXPERTS)),
    Decoder(("phimoe",), "Phimoe",
            (_NORMS_WITH_BIAS, _ATTENTION, _BIASES_IF_STATED, _MIXTRAL_EXPERTS),
            "embed_tokens.weight ? H\nnorm.weight H\nnorm.bias H"),
    Decoder(("qwen2_moe",), "Qwen2Moe",
            (_NORMS, _ATTENTION, _BIASES_OF_QWEN2_MOE, (_EXPERTS + _SHARED_EXPERT, _MLP))),
    Decoder(("qwen3_moe",), "Qwen3Moe",
            (_NORMS, _ATTENTION, _BIASES_IF_STATED, _HEAD_NORMS, (_EXPERTS, _MLP))),
    Decoder(("qwen3_vl_moe_text",), "Qwen3VLMoe",
            (_NORMS, _ATTENTION, _BIASES_IF_STATED, _HEAD_NORMS, (_STACKED_EXPERTS, _MLP))),
    Decoder(("deepseek_v3",), "DeepseekV3",
            (_NORMS, _LATENT, (_LATENT_QUERY, _WHOLE_QUERY),
             (_EXPERTS + _SHARED_EXPERTS + _CORRECTION, _MLP))),
    Decoder(("deepseek_v2",), "DeepseekV2",
            (_NORMS, _LATENT, (_LATENT_QUERY, _WHOLE_QUERY),
             (_EXPERTS + _SHARED_EXPERTS + _SHARED_EXPERTS_BIASES, _MLP + _MLP_BIASES))),
    Decoder(("ernie4_5_moe",), "Ernie4_5_Moe",
            (_NORMS, _ATTENTION, _ERNIE_BIASES,
             (_EXPERTS + _ERNIE_STATISTICS, _MLP + _ERNIE_MLP_BIASES)),
            head_bias="use_bias"),
    Decoder(("gpt_oss",), "GptOss", (_NORMS, _ATTENTION, _SINKS, _GPT_OSS_EXPERTS)),
)  # fmt: skip

_CLIP_LAYER = """
layer_norm1.weight           -
layer_norm1.bias             -
layer_norm2.weight           -
layer_norm2.bias             -
mlp.fc1.weight               -
mlp.fc1.bias                 -
mlp.fc2.weight               -
mlp.fc2.bias                 -
self_attn.q_proj.weight      -
self_attn.q_proj.bias        -
self_attn.k_proj.weight      -
self_attn.k_proj.bias        -
self_attn.v_proj.weight      -
self_attn.v_proj.bias        -
self_attn.out_proj.weight    -
self_attn.out_proj.bias      -
"""
_QWEN_ATTENTION = """
attn.qkv.weight    -
attn.qkv.bias      -
attn.proj.weight   -
attn.proj.bias     -
"""

TOWERS = (
    Tower(("clip_vision_model",), "vision_model.encoder.layers", _CLIP_LAYER, """
vision_model.embeddings.class_embedding             -
vision_model.embeddings.patch_embedding.weight      -
vision_model.embeddings.position_embedding.weight   -
vision_model.pre_layrnorm.weight                    -
vision_model.pre_layrnorm.bias                      -
vision_model.post_layernorm.weight                  -
vision_model.post_layernorm.bias                    -
"""),
    Tower(("siglip_vision_model",), "vision_model.encoder.layers", _CLIP_LAYER, """
vision_model.embeddings.patch_embedding.weight      -
vision_model.embeddings.patch_embedding.bias        -
vision_model.embeddings.position_embedding.weight   -
vision_model.post_layernorm.weight                  -
vision_model.post_layernorm.bias                    -
vision_model.head.probe                             -   maybe
vision_model.head.attention.in_proj_weight          -   maybe
vision_model.head.attention.in_proj_bias            -   maybe
vision_model.head.attention.out_proj.weight         -   maybe
vision_model.head.attention.out_proj.bias           -   maybe
vision_model.head.layernorm.weight                  -   maybe
vision_model.head.layernorm.bias                    -   maybe
vision_model.head.mlp.fc1.weight                    -   maybe
vision_model.head.mlp.fc1.bias                      -   maybe
vision_model.head.mlp.fc2.weight                    -   maybe
vision_model.head.mlp.fc2.bias                      -   maybe
"""),
    Tower(("pixtral",), "transformer.layers", """
attention.q_proj.weight         -
attention.k_proj.weight         -
attention.v_proj.weight         -
attention.o_proj.weight         -
attention_norm.weight           -
feed_forward.gate_proj.weight   -
feed_forward.up_proj.weight     -
feed_forward.down_proj.weight   -
ffn_norm.weight                 -
""", """
ln_pre.weight       -
patch_conv.weight   -
"""),
    Tower(("internvl_vision",), "encoder.layer", """
attention.q_proj.weight             -
attention.q_proj.bias               -   attention_bias
attention.k_proj.weight             -
attention.k_proj.bias               -   attention_bias
attention.v_proj.weight             -
attention.v_proj.bias               -   attention_bias
attention.projection_layer.weight   -
attention.projection_layer.bias     -
attention.q_norm.weight             -   use_qk_norm
attention.k_norm.weight             -   use_qk_norm
lambda_1                            -
lambda_2                            -
layernorm_before.weight             -
layernorm_before.bias               -   maybe
layernorm_after.weight              -
layernorm_after.bias                -   maybe
mlp.fc1.weight                      -
mlp.fc1.bias                        -
mlp.fc2.weight                      -
mlp.fc2.bias                        -
""", """
embeddings.cls_token                            -
embeddings.patch_embeddings.projection.weight   -
embeddings.patch_embeddings.projection.bias     -
embeddings.position_embeddings                  -   use_absolute_position_embeddings+
embeddings.mask_token                           -   maybe
layernorm.weight                                -   maybe
layernorm.bias                                  -   maybe
"""),
    Tower(("qwen2_vl", "qwen2_vl_vision"), "blocks", _QWEN_ATTENTION + """
norm1.weight     -
norm1.bias       -
norm2.weight     -
norm2.bias       -
mlp.fc1.weight   -
mlp.fc1.bias     -
mlp.fc2.weight   -
mlp.fc2.bias     -
""", """
patch_embed.proj.weight   -
merger.ln_q.weight        -
merger.ln_q.bias          -
merger.mlp.0.weight       -
merger.mlp.0.bias         -
merger.mlp.2.weight       -
merger.mlp.2.bias         -
""", ("depth",)),
    Tower(("qwen2_5_vl", "qwen2_5_vl_vision"), "blocks", _QWEN_ATTENTION + """
norm1.weight           -
norm2.weight           -
mlp.gate_proj.weight   -
mlp.gate_proj.bias     -
mlp.up_proj.weight     -
mlp.up_proj.bias       -
mlp.down_proj.weight   -
mlp.down_proj.bias     -
""", """
patch_embed.proj.weight   -
merger.ln_q.weight        -
merger.mlp.0.weight       -
merger.mlp.0.bias         -
merger.mlp.2.weight       -
merger.mlp.2.bias         -
""", ("depth",)),
    Tower(("qwen3_vl", "qwen3_vl_moe", "qwen3_vl_vision", "qwen3_vl_moe_vision"), "blocks",
          _QWEN_ATTENTION + """
norm1.weight            -
norm1.bias              -
norm2.weight            -
norm2.bias              -
mlp.linear_fc1.weight   -
mlp.linear_fc1.bias     -
mlp.linear_fc2.weight   -
mlp.linear_fc2.bias     -
""", """
patch_embed.proj.weight                    -
patch_embed.proj.bias                      -
pos_embed.weight                           -
merger.norm.weight                         -
merger.norm.bias                           -
merger.linear_fc1.weight                   -
merger.linear_fc1.bias                     -
merger.linear_fc2.weight                   -
merger.linear_fc2.bias                     -
deepstack_merger_list.*.norm.weight         -
deepstack_merger_list.*.norm.bias           -
deepstack_merger_list.*.linear_fc1.weight   -
deepstack_merger_list.*.linear_fc1.bias     -
deepstack_merger_list.*.linear_fc2.weight   -
deepstack_merger_list.*.linear_fc2.bias     -
""", ("depth",)),
    Tower(("qwen2_audio_encoder",), "layers", """
fc1.weight                    -
fc1.bias                      -
fc2.weight                    -
fc2.bias                      -
final_layer_norm.weight       -
final_layer_norm.bias         -
self_attn.q_proj.weight       -
self_attn.q_proj.bias         -
self_attn.k_proj.weight       -
self_attn.v_proj.weight       -
self_attn.v_proj.bias         -
self_attn.out_proj.weight     -
self_attn.out_proj.bias       -
self_attn_layer_norm.weight   -
self_attn_layer_norm.bias     -
""", """
conv1.weight             -
conv1.bias               -
conv2.weight             -
conv2.bias               -
embed_positions.weight   -
layer_norm.weight        -
layer_norm.bias          -
""", ("encoder_layers", "num_hidden_layers")),
)  # fmt: skip

_LLAVA_PROJECTOR = """
multi_modal_projector.linear_1.weight   -
multi_modal_projector.linear_1.bias     -   multimodal_projector_bias+
multi_modal_projector.linear_2.weight   -
multi_modal_projector.linear_2.bias     -   multimodal_projector_bias+
"""
_IN_LLAVA = ("language_model.model.", "language_model.lm_head.")
_TOWER = (("vision_config", "vision_tower."),)

COMPOSITES = (
    Composite(("qwen2_vl",), "Qwen2VL", "model.", "lm_head.", (("vision_config", "visual."),)),
    Composite(("qwen2_5_vl",), "Qwen2_5_VL", "model.", "lm_head.",
              (("vision_config", "visual."),)),
    Composite(("qwen3_vl",), "Qwen3VL", "model.language_model.", "lm_head.",
              (("vision_config", "model.visual."),)),
    Composite(("qwen3_vl_moe",), "Qwen3VLMoe", "model.language_model.", "lm_head.",
              (("vision_config", "model.visual."),)),
    Composite(("llava",), "Llava", *_IN_LLAVA, _TOWER, _LLAVA_PROJECTOR),
    Composite(("llava_next",), "LlavaNext", *_IN_LLAVA, _TOWER,
              _LLAVA_PROJECTOR + "image_newline ?\n"),
    Composite(("gemma3",), "Gemma3", *_IN_LLAVA, _TOWER, """
multi_modal_projector.mm_input_projection_weight   -
multi_modal_projector.mm_soft_emb_norm.weight      -
"""),
    Composite(("internvl",), "InternVL", *_IN_LLAVA, _TOWER, """
multi_modal_projector.layer_norm.weight   -
multi_modal_projector.layer_norm.bias     -
multi_modal_projector.linear_1.weight     -
multi_modal_projector.linear_1.bias       -
multi_modal_projector.linear_2.weight     -
multi_modal_projector.linear_2.bias       -
"""),
    Composite(("mistral3",), "Mistral3", *_IN_LLAVA, _TOWER, """
multi_modal_projector.linear_1.weight                     -
multi_modal_projector.linear_1.bias                       -   multimodal_projector_bias
multi_modal_projector.linear_2.weight                     -
multi_modal_projector.linear_2.bias                       -   multimodal_projector_bias
multi_modal_projector.norm.weight                         -
multi_modal_projector.patch_merger.merging_layer.weight   -
"""),
    Composite(("qwen2_audio",), "Qwen2Audio", *_IN_LLAVA, (("audio_config", "audio_tower."),), """
multi_modal_projector.linear.weight   -
multi_modal_projector.linear.bias     -
"""),
)  # fmt: skip
