"""The model families and their layouts. **This is the table to extend**; see `docs/names.md`.

Read from transformers 4.49 to 5.23 (`conversion_mapping.py`, the modeling files and, for every
family in `tests/naming/layouts`, the state dicts of live models). A family that is not listed has
the same names in memory as on the hub.

When the names in memory changed: vision-language models in 4.52 (`model.language_model`), stacked
experts in 5.0, CLIP and SigLIP towers in 5.6 (no `vision_model`), Qwen2-Audio in 5.10.
"""

from __future__ import annotations

from reshard.naming.layouts import Family, Layout, Stacked

_HUB = "as on the hub"


def _experts(block: str, gate: str, up: str, down: str) -> tuple[Stacked, ...]:
    """transformers 5 stacks gate over up as `[E, 2I, H]` and down as `[E, H, I]`."""
    experts = f"**.{block}.experts"
    parts = (f"{experts}.*.{gate}.weight", f"{experts}.*.{up}.weight")
    return (
        Stacked(f"{experts}.gate_up_proj", parts),
        Stacked(f"{experts}.down_proj", (f"{experts}.*.{down}.weight",)),
    )


QWEN2_VL = Family(
    ("qwen2_vl", "qwen2_5_vl"),
    (
        Layout(_HUB, (4, 45), (4, 52)),
        Layout(
            "transformers 4.52 and later",
            (4, 52),
            names=(("visual.**", "model.visual.**"), ("model.**", "model.language_model.**")),
        ),
        Layout("the AutoModel class", names=(("model.**", "language_model.**"),)),
    ),
)

_LLAVA_4_52 = (
    ("language_model.model.**", "model.language_model.**"),
    ("language_model.lm_head.**", "lm_head.**"),
    ("vision_tower.**", "model.vision_tower.**"),
    ("multi_modal_projector.**", "model.multi_modal_projector.**"),
    ("image_newline", "model.image_newline"),
)
_CLIP_TOWER = ("vision_tower.vision_model.**", "vision_tower.**")
_BACKBONE = ("language_model.model.**", "language_model.**")

LLAVA = Family(
    (
        "llava", "llava_next", "llava_next_video", "llava_onevision", "vipllava", "gemma3",
        "internvl", "mistral3", "paligemma", "aya_vision", "got_ocr2",
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
                *_LLAVA_4_52,
            ),
        ),
        Layout("written by transformers 5.6 or later without the base", names=(_CLIP_TOWER,)),
        Layout("the AutoModel class", names=(_BACKBONE,)),
        Layout("the AutoModel class of transformers 5.6 and later", names=(_BACKBONE, _CLIP_TOWER)),
    ),
)  # fmt: skip

QWEN2_AUDIO = Family(
    ("qwen2_audio", "voxtral", "audioflamingo3", "glmasr", "musicflamingo"),
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
        Layout("the AutoModel class", names=(_BACKBONE,)),
    ),
)

MIXTRAL = Family(
    ("mixtral", "minimax"),
    (
        Layout(_HUB, (4, 36), (5, 0)),
        Layout(
            "transformers 5.0 and later",
            (5, 0),
            names=(("**.block_sparse_moe.**", "**.mlp.**"),),
            stacked=_experts("block_sparse_moe", "w1", "w3", "w2"),
        ),
    ),
)

PHIMOE = Family(
    ("phimoe",),
    (
        Layout(_HUB, (4, 46), (5, 0)),
        Layout(
            "transformers 5.0 and later",
            (5, 0),
            names=(
                ("**.block_sparse_moe.gate.**", "**.mlp.router.**"),
                ("**.block_sparse_moe.**", "**.mlp.**"),
            ),
            stacked=_experts("block_sparse_moe", "w1", "w3", "w2"),
        ),
    ),
)

ERNIE4_5_MOE = Family(
    ("ernie4_5_moe",),
    (
        Layout(_HUB, (4, 54), (5, 0)),
        Layout(
            "transformers 5.0 and later",
            (5, 0),
            names=(("**.mlp.moe_statics.**", "**.mlp.gate.moe_statics.**"),),
            stacked=_experts("mlp", "gate_proj", "up_proj", "down_proj"),
        ),
    ),
)

QWEN2_MOE = Family(
    (
        "qwen2_moe", "qwen3_moe", "qwen3_next", "olmoe", "flex_olmo", "deepseek_v2", "deepseek_v3",
        "dots1", "glm4_moe", "glm4v_moe", "hunyuan_v1_moe", "exaone_moe",
    ),
    (
        Layout(_HUB, (4, 40), (5, 0)),
        Layout(
            "transformers 5.0 and later",
            (5, 0),
            stacked=_experts("mlp", "gate_proj", "up_proj", "down_proj"),
        ),
    ),
)  # fmt: skip

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

FAMILIES = (QWEN2_VL, LLAVA, QWEN2_AUDIO, MIXTRAL, PHIMOE, ERNIE4_5_MOE, QWEN2_MOE, QWEN3_VL_MOE)

#: Which dimension of a hub tensor is the model's width: tells orientations apart.
WIDTHS = (("**.mlp.experts.gate_up_proj", 1), ("**.mlp.experts.down_proj", 2))

#: Vision towers (`vision_config.model_type`) whose hub names have the part `vision_model`.
TOWERS = ("clip_vision_model", "siglip_vision_model")

#: Tensors that a module computes from its config: never trained, in some files and not in others.
#: transformers ignores the same names on load (`_keys_to_ignore_on_load_unexpected`).
CONSTANTS = (
    "**.rotary_emb.inv_freq",
    "**.rotary_pos_emb.inv_freq",
    "**.embeddings.position_ids",
    "**.attn.masked_bias",
)

#: Parts of a name that wrappers insert: DDP and DeepSpeed, torch.compile, Lightning, FSDP1,
#: activation checkpointing.
WRAPPERS = frozenset(
    {"module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
)

#: Prefixes under which trainers keep the model, tried beside whatever all names have in common.
PREFIXES = ("model.", "actor.", "policy.", "pretrained_model.", "base_model.model.",
            "model.base_model.model.")  # fmt: skip
