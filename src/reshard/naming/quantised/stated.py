"""What a model's config says of the quantisation of its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from msgspec import Struct

# The keys of it: transformers', that of compressed-tensors before 0.9, and that of MLX.
_KEYS = ("quantization_config", "compression_config", "quantization")
_TITLES = {
    "fp8": "fp8",
    "fbgemm_fp8": "fp8 (FBGEMM)",
    "mxfp4": "MXFP4",
    "mxfp8": "MXFP8",
    "nvfp4": "NVFP4",
    "awq": "AWQ",
    "gptq": "GPTQ",
    "bitnet": "BitNet",
    "aqlm": "AQLM",
    "vptq": "VPTQ",
    "eetq": "EETQ",
    "hqq": "HQQ",
    "quark": "Quark",
    "gguf": "GGUF",
}
# Methods whose weights may be codes of readable kinds; the tensors decide.
_READ = ("fp8", "fbgemm_fp8", "mxfp4", "mxfp8", "compressed-tensors", "modelopt", "quark")

# That of ModelOpt's FP8_PB_WO, which its configs do not state.
_MODELOPT_BLOCK = (128, 128)


class Statement(Struct, frozen=True):
    """A config's statement. `paths` are the dotted paths of the keys that make it.

    `title` names the kind, as far as the config does. `block` are the rows and columns that a
    scale stands for, where it says so. `readable`: the method has kinds that are read as numbers.
    """

    title: str
    paths: tuple[str, ...]
    block: tuple[int, int] | None = None
    readable: bool = False


def statement(config: Mapping[str, Any]) -> Statement | None:
    """What a parsed `config.json` says; None where it says nothing of a quantisation."""
    found = list(_sections(config))
    if not found:
        return None
    _, stated = found[0]
    method = _method(stated)
    return Statement(
        _title(method, stated),
        tuple(path for path, _ in found),
        _block(stated),
        method in _READ,
    )


def _sections(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The statements at the top level and in the configs of a composite model's parts."""
    parts = {f"{key}.": part for key, part in config.items() if isinstance(part, Mapping)}
    for prefix, level in {"": config, **parts}.items():
        for key in _KEYS:
            stated = level.get(key)
            if isinstance(stated, Mapping) and (key != "quantization" or "bits" in stated):
                yield f"{prefix}{key}", stated


def _method(stated: Mapping[str, Any]) -> str:
    method = stated.get("quant_method")
    if isinstance(method, str):
        return method.lower()
    if "config_groups" in stated:
        return "compressed-tensors"
    if stated.get("load_in_8bit") or stated.get("load_in_4bit"):
        return "bitsandbytes"
    if "quant_algo" in stated:
        return "modelopt"
    return "mlx" if {"group_size", "bits"} <= stated.keys() else "an unnamed method"


def _title(method: str, stated: Mapping[str, Any]) -> str:
    bits = stated.get("bits")
    if method == "bitsandbytes":
        four = "nf4" if stated.get("bnb_4bit_quant_type") == "nf4" else "4-bit"
        return f"bitsandbytes {four if stated.get('load_in_4bit') else 'int8'}"
    if method == "compressed-tensors":
        return f"compressed-tensors {stated.get('format') or ''}".rstrip()
    if method == "modelopt":
        return f"ModelOpt {stated.get('quant_algo') or ''}".rstrip()
    title = "MLX" if method == "mlx" else _TITLES.get(method, method)
    return f"{title} ({bits} bits)" if isinstance(bits, int) else title


def _block(stated: Mapping[str, Any]) -> tuple[int, int] | None:
    if str(stated.get("quant_algo", "")).upper() == "FP8_PB_WO":
        return _MODELOPT_BLOCK
    block = stated.get("weight_block_size")
    if block is None:
        groups = stated.get("config_groups")
        for group in groups.values() if isinstance(groups, Mapping) else ():
            weights = group.get("weights") if isinstance(group, Mapping) else None
            block = weights.get("block_structure") if isinstance(weights, Mapping) else None
            if block is not None:
                break
    if isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block):
        return block[0], block[1]
    return None
