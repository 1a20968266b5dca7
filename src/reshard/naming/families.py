"""The model families and their layouts. **This is the table to extend**; see `docs/names.md`.

Read from transformers 4.49 to 5.23 (`conversion_mapping.py`, the modeling files and, for every
family in `tests/naming/layouts`, the state dicts of loaded models). A family that is not listed has
the same names in memory as on the hub.

Families outside these tables were read only from loaded classes of 4.57 and 5.23; where the two
differ, the change is assumed to be that of 5.0.

When the names in memory changed: vision-language models in 4.52 (`model.language_model`), stacked
experts in 5.0, CLIP and SigLIP towers in 5.6 (no `vision_model`), Qwen2-Audio in 5.10.

Long because it is one table, which is searched as one.
"""

from __future__ import annotations

from reshard.naming.layouts import Family, Layout, Stacked

_HUB = "as on the hub"
#: The title of the names that released models have on disk.
AS_RELEASED = _HUB
_V5 = "transformers 5.0 and later"


#: Vision towers (`vision_config.model_type`) whose hub names have the part `vision_model`.
TOWERS = ("clip_vision_model", "siglip_vision_model", "siglip2_vision_model")
#: What such a tower is called in the hub's names.
TOWER_PARTS = ("vision_tower.", "model.vision_tower.", "model.vision_model.")


def _experts(block: str, gate: str, up: str, down: str) -> tuple[Stacked, ...]:
    """transformers 5 stacks gate over up as `[E, 2I, H]` and down as `[E, H, I]`."""
    experts = f"**.{block}.experts"
    parts = (f"{experts}.*.{gate}.weight", f"{experts}.*.{up}.weight")
    return (
        Stacked(f"{experts}.gate_up_proj", parts),
        Stacked(f"{experts}.down_proj", (f"{experts}.*.{down}.weight",)),
    )


_QWEN2_EXPERTS = _experts("mlp", "gate_proj", "up_proj", "down_proj")
_MIXTRAL_EXPERTS = _experts("block_sparse_moe", "w1", "w3", "w2")


def _since_5(
    *model_types: str,
    names: tuple[tuple[str, str], ...] = (),
    stacked: tuple[Stacked, ...] = (),
    backbone: tuple[tuple[str, str], ...] = (),
) -> Family:
    """A family whose loaded models have differed from the files since transformers 5.

    `backbone`: the names' pairs of the AutoModel class, where they are others.
    """
    late = Layout(_V5, (5, 0), names=names, stacked=stacked)
    inner = Layout("the AutoModel class", (5, 0), names=backbone, backbone=True)
    layouts = (Layout(_HUB, (4, 0), (5, 0)), late)
    return Family(model_types, (*layouts, inner) if backbone else layouts)


QWEN2_VL = Family(
    ("qwen2_vl", "qwen2_5_vl"),
    (
        Layout(_HUB, (4, 45), (4, 52)),
        Layout(
            "transformers 4.52 and later",
            (4, 52),
            names=(("visual.**", "model.visual.**"), ("model.**", "model.language_model.**")),
        ),
        Layout(
            "the AutoModel class",
            (4, 52),
            names=(("model.**", "language_model.**"),),
            backbone=True,
        ),
    ),
)

_LLAVA_4_52 = (
    ("language_model.model.**", "model.language_model.**"),
    ("language_model.lm_head.**", "lm_head.**"),
    ("vision_tower.**", "model.vision_tower.**"),
    ("multi_modal_projector.**", "model.multi_modal_projector.**"),
    ("image_newline", "model.image_newline"),
    # Mllama, Video-LLaVA, Fuyu
    ("vision_model.**", "model.vision_model.**"),
    ("image_tower.**", "model.image_tower.**"),
    ("video_tower.**", "model.video_tower.**"),
    ("vision_embed_tokens.**", "model.vision_embed_tokens.**"),
)
_CLIP_TOWER = ("vision_tower.vision_model.**", "vision_tower.**")
_BACKBONE = ("language_model.model.**", "language_model.**")

LLAVA = Family(
    (
        "llava", "llava_next", "llava_next_video", "llava_onevision", "vipllava", "gemma3",
        "internvl", "mistral3", "paligemma", "aya_vision", "got_ocr2", "aria", "fuyu",
        "pp_chart2table", "video_llava", "mllama",
    ),
    (
        Layout(_HUB, (4, 36), (4, 52)),
        Layout("transformers 4.52 and later", (4, 52), names=_LLAVA_4_52),
        # CLIP and SigLIP towers only; the others (Pixtral, InternVL's own) keep the layout above.
        Layout(
            "transformers 5.6 and later",
            (5, 6),
            names=(
                ("vision_tower.vision_model.**", "model.vision_tower.**"),
                ("image_tower.vision_model.**", "model.image_tower.**"),
                ("video_tower.vision_model.**", "model.video_tower.**"),
                *_LLAVA_4_52,
            ),
        ),
        Layout("written by transformers 5.6 or later without the base", names=(_CLIP_TOWER,)),
        Layout("the AutoModel class", (4, 52), (5, 6), names=(_BACKBONE,), backbone=True),
        Layout(
            "the AutoModel class of transformers 5.6 and later",
            (5, 6),
            names=(
                _BACKBONE,
                _CLIP_TOWER,
                ("image_tower.vision_model.**", "image_tower.**"),
                ("video_tower.vision_model.**", "video_tower.**"),
            ),
            backbone=True,
        ),
    ),
)  # fmt: skip


def _towers(part: str, *model_types: str) -> Family:
    """A family whose names differ in the CLIP or SigLIP tower alone."""
    hub, here = f"{part}.vision_model.**", f"{part}.**"
    return Family(
        model_types,
        (
            Layout(_HUB, (4, 52), (5, 6)),
            Layout(
                "transformers 5.6 and later", (5, 6), names=((f"model.{hub}", f"model.{here}"),)
            ),
            Layout("the AutoModel class", (5, 6), names=((hub, here),), backbone=True),
        ),
    )


VISION_TOWER = _towers("vision_tower", "cohere2_vision", "lfm2_vl", "lfm2-vl")
DEEPSEEK_VL = _towers("vision_model", "deepseek_vl", "deepseek_vl_hybrid")

QWEN2_AUDIO = Family(
    ("qwen2_audio", "voxtral", "voxtral_realtime", "audioflamingo3", "glmasr", "musicflamingo"),
    (
        Layout(_HUB, (4, 45), (5, 10)),
        Layout(
            "transformers 5.10 and later",
            (5, 10),
            names=(
                ("language_model.model.**", "model.language_model.**"),
                ("language_model.lm_head.**", "lm_head.**"),
                ("audio_tower.**", "model.audio_tower.**"),
                ("multi_modal_projector.**", "model.multi_modal_projector.**"),
            ),
        ),
        # https://github.com/huggingface/transformers/issues/45534
        Layout(
            "files of transformers 5.10 to 5.22 with a doubled model",
            names=(
                ("language_model.model.**", "model.language_model.model.**"),
                ("language_model.lm_head.**", "lm_head.**"),
                ("audio_tower.**", "model.audio_tower.**"),
                ("multi_modal_projector.**", "model.multi_modal_projector.**"),
            ),
        ),
        Layout("the AutoModel class", (5, 10), names=(_BACKBONE,), backbone=True),
    ),
)

MIXTRAL = _since_5(
    "mixtral", "minimax", "minimax_m2",
    names=(("**.block_sparse_moe.**", "**.mlp.**"),),
    stacked=_MIXTRAL_EXPERTS,
)  # fmt: skip

PHIMOE = _since_5(
    "phimoe",
    names=(
        ("**.block_sparse_moe.gate.**", "**.mlp.router.**"),
        ("**.block_sparse_moe.**", "**.mlp.**"),
    ),
    stacked=_MIXTRAL_EXPERTS,
)

QWEN2_MOE = _since_5(
    "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text", "qwen4_exp",
    "qwen4_exp_text", "qwen3_omni_moe_text", "olmoe", "flex_olmo", "deepseek_v2", "deepseek_v3",
    "deepseek_v32", "dots1", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm4v_moe_text",
    "glm_moe_dsa", "hunyuan_v1_moe", "afmoe", "beam", "cohere2_moe", "mellum", "solar_open",
    stacked=_QWEN2_EXPERTS,
)  # fmt: skip

# Kimi-K2 is code of its own, with the files' names, or it is trained as DeepSeek-V3.
KIMI_K2 = Family(
    ("kimi_k2",),
    (Layout(_HUB, (4, 0)), Layout("as DeepSeek-V3 has them", stacked=_QWEN2_EXPERTS)),
)

# The experts of Qwen2-MoE, and tensors beside them that were renamed.
ERNIE4_5_MOE = _since_5(
    "ernie4_5_moe",
    names=(("**.mlp.moe_statics.**", "**.mlp.gate.moe_statics.**"),),
    stacked=_QWEN2_EXPERTS,
)

EXAONE_MOE = _since_5(
    "exaone_moe",
    names=(("**.mlp.e_score_correction_bias", "**.mlp.gate.e_score_correction_bias"),),
    stacked=_QWEN2_EXPERTS,
)

HY_V3 = _since_5(
    "hy_v3",
    names=(
        ("**.mlp.router.gate.**", "**.mlp.gate.**"),
        ("**.mlp.expert_bias", "**.mlp.e_score_correction_bias"),
        ("**.mlp.shared_mlp.**", "**.mlp.shared_experts.**"),
    ),
    stacked=_QWEN2_EXPERTS,
)

LAGUNA = _since_5(
    "laguna",
    names=(
        ("**.mlp.experts.e_score_correction_bias", "**.mlp.gate.e_score_correction_bias"),
        ("**.mlp.shared_expert.**", "**.mlp.shared_experts.**"),
    ),
    stacked=_QWEN2_EXPERTS,
)

KOLIBRI1 = _since_5(
    "kolibri1",
    names=(
        ("**.moe.router.expert_bias", "**.mlp.gate.e_score_correction_bias"),
        ("**.post_attn_norm.**", "**.post_self_attn_layernorm.**"),
        ("**.post_ffn_norm.**", "**.post_mlp_layernorm.**"),
    ),
    stacked=_QWEN2_EXPERTS,
)

AXK1 = _since_5(
    "axk1",
    names=(("**.post_mlp_layernorm.**", "**.mlp.post_mlp_layernorm.**"),),
    stacked=_QWEN2_EXPERTS,
)

AXK2 = _since_5(
    "axk2",
    names=(
        ("**.W_down.**", "**.mlp.fc1.**"),
        ("**.W_up.**", "**.mlp.fc2.**"),
        ("**.self_attn.q_b_proj.**", "**.self_attn.q_gate_proj.**"),
    ),
    stacked=_QWEN2_EXPERTS,
)

MIMO_V2_FLASH = _since_5(
    "mimo_v2_flash",
    names=(("**.self_attn.attention_sink_bias", "**.self_attn.sinks"),),
    stacked=_QWEN2_EXPERTS,
)

FLINT = _since_5(
    "flint",
    names=(("**.self_attn.softmax_offset", "**.self_attn.sinks"),),
    stacked=_QWEN2_EXPERTS,
)

JAMBA = _since_5("jamba", stacked=_experts("feed_forward", "gate_proj", "up_proj", "down_proj"))

LFM2_MOE = _since_5("lfm2_moe", stacked=_experts("feed_forward", "w1", "w3", "w2"))

NEMOTRON_H = _since_5(
    "nemotron_h",
    names=(("backbone.**", "model.**"),),
    stacked=tuple(
        Stacked(f"**.mixer.experts.{name}", (f"**.mixer.experts.*.{name}.weight",))
        for name in ("up_proj", "down_proj")
    ),
)

# Experts that are stacked on the hub as well, by other names.
GRANITEMOE = _since_5(
    "granitemoe", "granitemoehybrid", "granitemoeshared",
    names=(
        ("**.block_sparse_moe.input_linear.weight", "**.block_sparse_moe.experts.gate_up_proj"),
        ("**.block_sparse_moe.output_linear.weight", "**.block_sparse_moe.experts.down_proj"),
        ("**.block_sparse_moe.router.layer.weight", "**.block_sparse_moe.router.weight"),
    ),
)  # fmt: skip

ARIA_TEXT = _since_5(
    "aria_text",
    names=(
        ("**.mlp.experts.fc1.weight", "**.mlp.experts.gate_up_proj"),
        ("**.mlp.experts.fc2.weight", "**.mlp.experts.down_proj"),
    ),
)

GPT_NEOX = _since_5("gpt_neox", names=(("embed_out.**", "lm_head.**"),))

GRANITE_SPEECH = _since_5(
    "granite_speech", "granite_speech_plus",
    names=(
        ("language_model.model.**", "model.language_model.**"),
        ("language_model.lm_head.**", "lm_head.**"),
        ("encoder.**", "model.encoder.**"),
        ("projector.**", "model.projector.**"),
    ),
    backbone=(_BACKBONE,),
)  # fmt: skip

# The thinkers alone; the models of Qwen-Omni that hold them and a talker are not trained whole.
QWEN_OMNI_THINKER = _since_5(
    "qwen2_5_omni_thinker", "qwen3_omni_moe_thinker",
    names=(
        ("visual.**", "model.visual.**"),
        ("audio_tower.**", "model.audio_tower.**"),
        ("model.**", "model.language_model.**"),
    ),
    backbone=(("model.**", "language_model.**"),),
)  # fmt: skip

PADDLEOCR_VL = _since_5(
    "paddleocr_vl",
    names=(
        ("visual.**", "model.visual.**"),
        ("mlp_AR.**", "model.projector.**"),
        ("model.**", "model.language_model.**"),
    ),
    backbone=(("mlp_AR.**", "projector.**"), ("model.**", "language_model.**")),
)

HYPERCLOVAX_VISION = _since_5(
    "hyperclovax_vision_v2", names=(("**.vision_projector.**", "**.projector.**"),)
)

LFM3_VL = _since_5(
    "lfm3_vl", "lfm3_vl_vision",
    names=(("**.patchifier.**", "**.patch_embed.**"), ("patchifier.**", "patch_embed.**")),
)  # fmt: skip

_VIT_LAYER = (
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
)


def _vit(*outer: str) -> tuple[tuple[str, str], ...]:
    """The pairs of a ViT encoder that lies under one of these prefixes."""
    parts = (*((f"{hub}.", f"{here}.") for hub, here in _VIT_LAYER), ("", ""))
    return tuple(
        (f"{prefix}encoder.layer.*.{hub}**", f"{prefix}layers.*.{here}**")
        for prefix in outer
        for hub, here in parts
    )


VIT = _since_5(
    "vit", "deit", "ijepa", "vit_msn", "vivit", "audio-spectrogram-transformer",
    names=_vit("", "*."),
)  # fmt: skip

# The first BERT files were converted from TensorFlow's, and kept its names of norms.
BERT = Family(
    ("bert", "albert", "electra", "roberta", "xlm-roberta", "camembert", "esm"),
    (
        Layout(_HUB, (0,)),
        Layout(
            "files with TensorFlow's names",
            names=(
                ("**.LayerNorm.weight", "**.LayerNorm.gamma"),
                ("**.LayerNorm.bias", "**.LayerNorm.beta"),
            ),
            released=True,
        ),
    ),
)

# Towers by themselves, their classes too.
CLIP_VISION = Family(
    (*TOWERS, "chinese_clip_vision_model", "mlcd_vision_model", "mlcd"),
    (
        Layout(_HUB, (4, 0), (5, 6)),
        Layout("transformers 5.6 and later", (5, 6), names=(("vision_model.**", "**"),)),
    ),
)
CLIP_TEXT = Family(
    ("clip_text_model", "siglip_text_model"),
    (
        Layout(_HUB, (4, 0), (5, 6)),
        Layout("transformers 5.6 and later", (5, 6), names=(("text_model.**", "**"),)),
    ),
)

VISION_ENCODER_DECODER = _since_5("vision-encoder-decoder", names=_vit("encoder."))

ULTRABERT = _since_5(
    "ultrabert", names=(("ultrabert.**", "model.**"), ("cls.**", "head.decoder.**"))
)

QWEN3_VL_MOE = Family(
    ("qwen3_vl_moe",),
    (
        Layout(_HUB, (4, 57), (5, 0)),
        Layout(
            "transformers 5.0 and later",
            (5, 0),
            swapped=("**.mlp.experts.gate_up_proj", "**.mlp.experts.down_proj"),
        ),
    ),
)

#: The same names in memory as on the hub, in every version.
PLAIN = Family((), (Layout(_HUB, (0,)),))

FAMILIES = (
    QWEN2_VL, LLAVA, QWEN2_AUDIO, VISION_TOWER, DEEPSEEK_VL, MIXTRAL, PHIMOE, ERNIE4_5_MOE,
    QWEN2_MOE, KIMI_K2, QWEN3_VL_MOE, EXAONE_MOE, HY_V3, LAGUNA, KOLIBRI1, AXK1, AXK2,
    MIMO_V2_FLASH, FLINT, JAMBA, LFM2_MOE, NEMOTRON_H, GRANITEMOE, ARIA_TEXT, GPT_NEOX,
    GRANITE_SPEECH, QWEN_OMNI_THINKER, PADDLEOCR_VL, HYPERCLOVAX_VISION, LFM3_VL, VIT,
    VISION_ENCODER_DECODER,
    BERT, CLIP_VISION, CLIP_TEXT, ULTRABERT,
)  # fmt: skip

#: Model types, of a model or of a part of one, whose loaded models under transformers 5 hold split,
#: joined or permuted tensors of the files, or rename them by number. A fit onto such a base lists
#: what does not match; --names memory refuses.
UNSUPPORTED = (
    "altclip", "bailing_hybrid", "beit", "cohere_asr", "colpali", "cosmos3_edge",
    "cosmos3_omni", "deepseek_ocr2", "deepseek_v4", "depth_pro", "dinov2",
    "dinov2_with_registers", "dinov3_convnext", "dinov3_vit", "dots3_note", "ernie4_5_vl_moe",
    "gte", "hrm_text", "hunyuan_vl", "hy_v4", "inkling", "inkling2", "inkling2_text",
    "inkling_mm_model", "jina_embeddings_v3", "kimi_k25", "kimi_linear", "longcat_flash",
    "mimi_encoder", "minimax_m3_vl", "mistral_large4", "mistral_large4_text", "molmo2",
    "molmo2_text", "nemo_speechlm", "nemotron_h_omni", "nomic_bert", "olmo_hybrid", "pi0",
    "pixio", "pp_doclayout_v3", "pp_doclayout_v4", "qianfan_ocr", "radio", "rf_detr",
    "sam3_tracker", "sam3_tracker_video", "sam3_video", "sapiens2", "segformer",
    "step3p5_vision", "step3p7", "swin", "t5gemma2", "timesfm2_5", "tipsv2",
    "tipsv2_text_model", "tipsv2_vision_model", "ultravbert", "unlimited_ocr", "videomae",
    "vision-text-dual-encoder", "vit_mae", "yolos",
)  # fmt: skip

#: Classes whose loaded models hold tensors, in every version, that neither the files nor the ties
#: give: shared by number, or computed. They are refused in the same way.
UNSUPPORTED_CLASSES = (
    "BarkModel", "Blip2Model", "CpmAntForCausalLM", "FlavaForPreTraining",
    "FSMTForConditionalGeneration", "FSMTModel", "LukeForMaskedLM", "MarianMTModel",
    "Sam2Model", "SamHQModel", "SamModel", "TransfoXLLMHeadModel",
    "UdopForConditionalGeneration", "UdopModel",
)  # fmt: skip

#: Families whose rules hold for a model that stands alone, not for one inside another.
ALONE = (CLIP_TEXT, CLIP_VISION)

#: What classes with a head call the backbone that is in them, where it is not `model`
#: (`base_model_prefix`): (part, model types).
BACKBONES = (
    ("transformer", ("bloom", "codegen", "ctrl", "dbrx", "falcon", "flaubert", "gpt-sw3", "gpt2",
                     "gpt_bigcode", "gpt_neo", "gptj", "imagegpt", "mpt", "openai-gpt",
                     "squeezebert", "xlm", "xlnet")),
    ("bert", ("bert", "bert-generation", "big_bird", "megatron-bert")),
    ("roberta", ("camembert", "roberta", "xlm-roberta", "xlm-roberta-xl", "xmod")),
    ("backbone", ("falcon_mamba", "mamba", "mamba2", "xlstm")),
    ("deberta", ("deberta", "deberta-v2")),
    ("data2vec_text", ("data2vec-text",)),
    ("roberta_prelayernorm", ("roberta-prelayernorm",)),
    *((name, (name,)) for name in (
        "albert", "biogpt", "convbert", "distilbert", "electra", "ernie", "esm", "fnet", "funnel",
        "git", "gpt_neox", "gpt_neox_japanese", "ibert", "layoutlm", "led", "longformer", "luke",
        "mobilebert", "mpnet", "mra", "nystromformer", "rembert", "roc_bert", "roformer", "rwkv",
        "tapas", "yoso",
    )),
)  # fmt: skip

#: Which dimension of a hub tensor is the model's width: distinguishes orientations.
WIDTHS = (("**.mlp.experts.gate_up_proj", 1), ("**.mlp.experts.down_proj", 2))

#: Model types whose input embedding has rows that neither head nor `vocab_size` count: Mllama's
#: for images, Moshi's for padding.
SPARE_ROWS = ("mllama", "mllama_text_model", "moshi")

#: Tensors that a module computes from its config: never trained, in some files and not in others.
#: transformers ignores the same names on load (`_keys_to_ignore_on_load_unexpected`).
CONSTANTS = (
    "**.rotary_emb.inv_freq",
    "**.rotary_pos_emb.inv_freq",
    "**.rotary_embeddings.inv_freq",
    "**.embeddings.position_ids",
    "embeddings.position_ids",
    # Causal masks: GPT-2 and its kin, with and without the backbone's name; GPT-NeoX.
    "**.attn.masked_bias",
    "**.attn.attention.masked_bias",
    "transformer.h.*.attn.attention.bias",
    "h.*.attn.attention.bias",
    "transformer.h.*.attn.causal_mask",
    "transformer.h.*.attn.bias",
    "decoder.transformer.h.*.attn.bias",
    "h.*.attn.bias",
    "gpt_neox.layers.*.attention.bias",
    "gpt_neox.layers.*.attention.masked_bias",
)

#: The same, of one model type: sinusoidal positions where others train theirs.
CONSTANTS_OF = {
    "marian": ("model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight"),
}

#: Tensors of released files that no loaded model holds, so that no training changes them:
#: multi-token-prediction layers, which transformers ignores on load (5.23).
UNHELD = (
    "mtp.**",
    "model.mtp.**",
    "model.mtp_layers.**",
    "model.mtp_block.**",
    "model.mtp_emb_norm.**",
    "model.mtp_hidden_norm.**",
    "model.mtp_linear_proj.**",
    "model.language_model.mtp.**",
)

#: Where a config states how many such layers follow the last (DeepSeek-V3, GLM-4.5): they are
#: numbered as the others are, under these names.
MORE_LAYERS = "num_nextn_predict_layers"
LAYERS = (
    "model.layers.*.**",
    "model.language_model.layers.*.**",
    "language_model.model.layers.*.**",
    "layers.*.**",
)

#: Parts of a name that wrappers insert: DDP and DeepSpeed, torch.compile, Lightning, FSDP1,
#: activation checkpointing.
WRAPPERS = frozenset(
    {"module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
)

#: Prefixes under which trainers keep the model, tried beside whatever all names have in common.
PREFIXES = ("model.", "actor.", "policy.", "pretrained_model.", "base_model.model.",
            "model.base_model.model.")  # fmt: skip
