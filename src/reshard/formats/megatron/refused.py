"""Tensors that show that a model is of an unsupported kind."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from reshard.containers.dcp.columns import dtype_of
from reshard.containers.dcp.metadata import Metadata
from reshard.core.regex import regex
from reshard.errors import UnsupportedError

# (what their names have, what they are, what to do)
_KINDS = (
    (
        regex(r"(^|\.)(lora_[AB]\b.*|adapter\.linear_(in|out)\..*|to_wrap\..*|base_layer\..*)"),
        "adapters (LoRA) of a Megatron model",
        "Merge them with the trainer that wrote them, and convert the merged checkpoint.",
    ),
    (
        regex(r"_quantizer\.|\._amax$|\._scale_inv$|weight_scale"),
        "weights that ModelOpt has quantised",
        "Convert the checkpoint from before that, or export it with ModelOpt.",
    ),
    (
        regex(r"(^|\.)mixer\.|\.linear_attention\.|\.conv1d\."),
        "state-space or linear attention layers, whose projections are laid out in their own way",
        "Export it with Megatron-Bridge, or with the trainer's own conversion.",
    ),
)
_WEIGHT = regex(r".*\.(weight|bias)(_w|_v)?")
# torch's names of types that weights in FP8 or FP4 are stored in.
_QUANTISED = regex(r"(torch\.)?(u?int8|float8_.*|float4_.*)")


def check(metadata: Metadata, keys: Iterable[str], folder: Path) -> None:
    """Refuse what is not read: adapters, quantised weights, some layers. Raises
    `UnsupportedError`."""
    for key in keys:
        for pattern, what, hint in _KINDS:
            if pattern.search(key):
                raise UnsupportedError(
                    f"it holds {what}, which are not read.", path=folder, tensor=key, hint=hint
                )
        dtype = dtype_of(metadata, key)
        if _WEIGHT.fullmatch(key) and _QUANTISED.fullmatch(dtype):
            raise UnsupportedError(
                f"it is stored as {dtype}: weights in FP8 or FP4 are not read.",
                path=folder,
                tensor=key,
                hint="Save them in bfloat16 (without --fp8-param-gather).",
            )
