"""Facts about inference engines, as tables. **The tables to extend**; see `docs/serving.md`.

Measured by running vLLM 0.33's own loader, llama.cpp's converter (of llama-cpp-python 0.3.36) and
mlx-lm 0.32 on sound folders and on folders that were damaged on purpose, and read from their
sources and those of sglang 0.5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from msgspec import Struct

EngineName = Literal["vllm", "sglang", "llama.cpp", "mlx"]
Effect = Literal["takes", "refuses", "random", "transposed"]


class Engine(Struct, frozen=True):
    """What an engine takes, whatever the architecture.

    files: the weight files that it reads, as a pattern. by_index: whether an index says which of
    them. pickled: whether it reads `pytorch_model*.bin`. unserved: classes of the tables that it
    has none for. scores: the classes of classifiers that it has, None for any. absent: what it does
    with a weight that is not there, `norms` with one of a norm. strange: what it does with an
    unknown weight, `biases` with an unknown bias. bare: whether it takes a backbone's names.
    codes: the `quant_method`s that it reads, None for all but MLX's.
    """

    title: str
    files: str
    by_index: bool = True
    pickled: bool = True
    unserved: tuple[str, ...] = ()
    scores: tuple[str, ...] | None = None
    absent: str = "refuses"
    norms: str = "refuses"
    strange: str = "refuses"
    biases: str = "refuses"
    bare: bool = False
    codes: tuple[str, ...] | None = None


_SILENT = "silently uses random values"

ENGINES: Mapping[EngineName, Engine] = {
    "vllm": Engine(
        "vLLM",
        "*.safetensors",
        unserved=("PhimoeForCausalLM",),
        absent=_SILENT,
        biases="silently drops",
    ),
    "sglang": Engine(
        "sglang",
        "*.safetensors",
        unserved=(
            "InternVLForConditionalGeneration",
            "LlavaNextForConditionalGeneration",
            "PhimoeForCausalLM",
        ),
        scores=(
            "Gemma2ForSequenceClassification",
            "LlamaForSequenceClassification",
            "Qwen2ForSequenceClassification",
            "Qwen3ForSequenceClassification",
        ),
        absent=_SILENT,
        norms=_SILENT,
        strange="silently drops or refuses",
        biases="silently drops or refuses",
    ),
    "llama.cpp": Engine(
        "llama.cpp",
        "model*.safetensors",
        unserved=(
            "InternVLForConditionalGeneration",
            "LlavaNextForConditionalGeneration",
            "PhimoeForCausalLM",
        ),
        scores=(),
        absent="still exports a model",
        norms="still exports a model",
        biases="exports",
        bare=True,
        codes=("bitnet", "fp8", "gptq", "compressed-tensors", "modelopt", "mxfp4"),
    ),
    "mlx": Engine(
        "mlx-lm",
        "model*.safetensors",
        by_index=False,
        pickled=False,
        unserved=(
            "InternVLForConditionalGeneration",
            "LlavaNextForConditionalGeneration",
            "Qwen2AudioForConditionalGeneration",
        ),
        scores=(),
        codes=("mxfp4", "mlx", "compressed-tensors", "awq", "gptq"),
    ),
}

#: How files may differ from the release's (`naming/released.py`); `tower`: in names of a tower that
#: lack `vision_model` alone.
LayoutChange = Literal["moved", "tower", "stacked", "transposed"]

_LLAVA = ("llava", "llava_next", "gemma3", "mistral3")
_QWEN2_VL = ("qwen2_vl", "qwen2_5_vl")
_MOE = ("qwen2_moe", "qwen3_moe")


def _rows(
    engine: EngineName, *rows: tuple[LayoutChange, tuple[str, ...], Effect]
) -> dict[tuple[EngineName, LayoutChange, str], Effect]:
    return {(engine, kind, model): effect for kind, models, effect in rows for model in models}


#: (engine, kind, model type) -> what it makes of such files. What is not listed is not known.
LAYOUTS: Mapping[tuple[EngineName, LayoutChange, str], Effect] = {
    **_rows(
        "vllm",
        ("moved", (*_QWEN2_VL, *_LLAVA), "takes"),
        ("moved", ("qwen2_audio",), "refuses"),
        ("tower", _LLAVA, "refuses"),
        ("stacked", ("qwen3_moe",), "takes"),
        ("stacked", ("mixtral",), "refuses"),
        ("transposed", ("qwen3_vl_moe",), "refuses"),
    ),
    **_rows(
        "sglang",
        ("moved", (*_QWEN2_VL, "qwen2_audio"), "refuses"),
        ("tower", ("gemma3",), "refuses"),
        ("tower", ("llava",), "takes"),
        ("stacked", ("qwen3_moe",), "random"),
        ("transposed", ("qwen3_vl_moe",), "refuses"),
    ),
    **_rows(
        "llama.cpp",
        ("moved", (*_QWEN2_VL, "qwen2_audio"), "takes"),
        ("tower", ("llava", "gemma3"), "takes"),
        ("stacked", _MOE, "takes"),
        ("transposed", ("qwen3_vl_moe",), "transposed"),
    ),
    **_rows(
        "mlx",
        ("moved", (*_QWEN2_VL, "llava", "mistral3"), "takes"),
        ("moved", ("gemma3",), "refuses"),
        ("tower", ("llava", "gemma3", "mistral3"), "takes"),
        ("stacked", (*_MOE, "mixtral"), "refuses"),
    ),
}

#: What mlx-lm takes for `rope_theta` where config.json does not state it, by model type; None: it
#: refuses. Those of `ROTARY` read `rope_parameters`.
MLX_THETA: Mapping[str, float | None] = {
    "llama": 1e4, "mistral": 1e4, "qwen2": 1e6, "gemma": 1e4, "gemma2": 1e4, "gemma3_text": 1e6,
    "mixtral": 1e6, "qwen2_moe": 1e6, "deepseek_v3": 1e4, "qwen3_moe": None,
    "qwen3_vl_moe_text": None, "ernie4_5_moe": None,
}  # fmt: skip
#: Models whose tie mlx-lm reads in `text_config` alone, and takes for granted or asks for.
MLX_TIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
MLX_ROTARY = ("qwen3", "qwen3_vl_text", "ministral3", "qwen3_5_text")

#: (engine, model type, field) -> what it does where config.json lacks the field.
FIELDS: Mapping[tuple[EngineName, str, str], str] = {
    ("vllm", "deepseek_v3", "topk_method"): "refuses",
    ("vllm", "deepseek_v3", "scoring_func"): "silently uses softmax",
    ("vllm", "qwen3_vl_moe_text", "norm_topk_prob"): "refuses",
    ("sglang", "deepseek_v3", "topk_method"): "refuses",
    ("sglang", "deepseek_v3", "scoring_func"): "refuses",
    ("mlx", "qwen3_moe", "num_experts"): "refuses",
    ("mlx", "qwen3_vl_moe_text", "num_experts"): "refuses",
    ("mlx", "qwen3_vl_moe_text", "norm_topk_prob"): "refuses",
}

#: Engine -> the tensors of right folders that it silently drops.
DROPPED: Mapping[EngineName, tuple[str, ...]] = {
    "mlx": ("**.mlp.moe_statics.e_score_correction_bias",),
}

#: Classifiers whose head has a bias in sglang that Hugging Face's has not.
SCORE_BIAS = ("Qwen2ForSequenceClassification", "Qwen3ForSequenceClassification")
