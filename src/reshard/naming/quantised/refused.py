"""The kinds of quantised weights whose codes are not read as numbers, recognised by their tensors.

**A table to extend.** Read off bitsandbytes 0.48 (functional.py: QuantState; nn/modules.py),
AutoGPTQ, AutoAWQ, compressed-tensors 0.20 (compressors), mlx-lm, TensorRT Model Optimizer and the
quantisers of transformers 5.23.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from msgspec import Struct

from reshard.core.tensors import Entry
from reshard.errors import UnsupportedError
from reshard.naming.quantised.mx import are_mx
from reshard.naming.quantised.stated import Statement

# The last part of a name -> the kind that it shows, and how many parts, itself included, follow the
# module's name.
_SIGNS = {
    "bitsandbytes__nf4": ("bitsandbytes nf4", 3),
    "bitsandbytes__fp4": ("bitsandbytes fp4", 3),
    "absmax": ("bitsandbytes 4-bit", 2),
    "quant_map": ("bitsandbytes 4-bit", 2),
    "nested_absmax": ("bitsandbytes 4-bit", 2),
    "nested_quant_map": ("bitsandbytes 4-bit", 2),
    "SCB": ("bitsandbytes int8", 1),
    "weight_format": ("bitsandbytes int8", 1),
    "g_idx": ("GPTQ", 1),
    "qweight": ("AWQ", 1),
    "qzeros": ("AWQ", 1),
    "weight_packed": ("compressed-tensors packed", 1),
    "weight_shape": ("compressed-tensors packed", 1),
    "weight_global_scale": ("NVFP4", 1),
    "weight_scale_2": ("NVFP4", 1),
    "weight_scales": ("EETQ", 1),
    "W_q": ("HQQ", 1),
    "codebooks": ("AQLM", 1),
    "qbiases": ("MLX", 1),
    "_data": ("quanto", 2),
}
# Last parts of names that tell, or may tell, a kind.
_TOLD = frozenset((*_SIGNS, "weight", "weight_packed"))
# If signs of several kinds occur together, the first of them here is the kind.
_RANK = (
    "bitsandbytes nf4", "bitsandbytes fp4", "bitsandbytes 4-bit", "bitsandbytes int8", "GPTQ",
    "NVFP4",
)  # fmt: skip
_NOT_CODES = "bias"


class Refused(Struct, frozen=True):
    """A kind that is not read: its name, and the modules whose weights are of it."""

    title: str
    modules: frozenset[str]

    def error(self, hint: str) -> UnsupportedError:
        """The error that says so."""
        return UnsupportedError(
            f"its weights are quantised by {self.title}, which reshard cannot dequantise "
            f"({len(self.modules)} modules, such as {min(self.modules)!r}).",
            hint=hint,
        )


def refused(entries: Mapping[str, Entry], stated: Statement | None) -> Refused | None:
    """The kind of quantisation that the tensors have, if reshard does not read it."""
    signs = list(_signs(entries))
    if not signs and stated is not None and not stated.readable:
        # Of methods that are not in the table: their codes are integers.
        signs = [
            (name.rpartition(".")[0], stated.title)
            for name, entry in entries.items()
            if len(entry.spec.shape) > 1 and not entry.spec.dtype.floating
        ]
    if not signs:
        return None
    kinds = Counter(kind for _, kind in signs)
    title = next((kind for kind in _RANK if kind in kinds), kinds.most_common(1)[0][0])
    if stated is not None and (not stated.readable or stated.title.startswith(title.split()[0])):
        title = stated.title
    elif stated is not None:
        title = f"{title} ({stated.title})"
    return Refused(title, frozenset(module for module, _ in signs))


def without_codes(entries: Mapping[str, Entry], kind: Refused) -> dict[str, Entry]:
    """The tensors that are not of the refused kind: all of its modules' but their biases."""
    return {
        name: entry
        for name, entry in entries.items()
        if name.rpartition(".")[2] == _NOT_CODES or not _is_of(name, kind.modules)
    }


def _is_of(name: str, modules: frozenset[str]) -> bool:
    """Whether a tensor is a module's own: `X.weight`, or `X.weight.absmax` beside it."""
    parts = name.split(".")
    return any(".".join(parts[:cut]) in modules for cut in range(len(parts) - 1, 0, -1))


def _signs(entries: Mapping[str, Entry]) -> Iterator[tuple[str, str]]:
    """The modules that hold codes, each with its kind."""
    for name, entry in entries.items():
        leaf = name[name.rfind(".") + 1 :]
        if leaf not in _TOLD:
            continue
        parts = name.split(".")
        kind, depth = _SIGNS.get(leaf, ("", 1))
        if leaf == "weight":
            kind = _told_by_its_shape(".".join(parts[:-1]), entry, entries)
        elif leaf == "weight_packed":
            scales = entries.get(".".join((*parts[:-1], "weight_scale")))
            kind = "" if scales is not None and are_mx(entry, scales) else kind
        if kind:
            yield ".".join(parts[:-depth]), kind


def _told_by_its_shape(module: str, entry: Entry, entries: Mapping[str, Entry]) -> str:
    """The kind of a module's weight that the names do not show, or nothing."""
    dtype, shape = entry.spec.dtype, entry.spec.shape
    if dtype.name == "uint32" and f"{module}.scales" in entries:
        return "MLX"
    scale = entries.get(f"{module}.weight_scale")
    wide = scale is not None and scale.spec.dtype.itemsize > 1
    if scale is not None and wide and dtype.name in ("int8", "uint8"):
        # ModelOpt's int4: two rows a byte, and a scale for each group of columns.
        packed = "BitNet" if scale.spec.numel == 1 else "packed int4"
        return "int8" if dtype.name == "int8" else packed
    if len(shape) != 2 or shape[1] != 1:
        return ""
    if dtype.name in ("uint8", "int8"):
        return "bitsandbytes 4-bit"
    numel = _adapted_numel(module, entries)
    # bnb_4bit_quant_storage: bytes of two codes each, seen as wider numbers.
    return "bitsandbytes 4-bit" if shape[0] * dtype.itemsize * 2 == numel else ""


def _adapted_numel(module: str, entries: Mapping[str, Entry]) -> int | None:
    """How many elements the weight has that an adapter wraps; None where none does."""
    wrapped = module.removesuffix(".base_layer")
    if wrapped == module:
        return None
    shapes = {
        matrix: entry.spec.shape
        for name, entry in entries.items()
        for matrix in ("lora_A", "lora_B")
        if name.startswith(f"{wrapped}.{matrix}.")
    }
    if len(shapes) != 2 or any(len(shape) != 2 for shape in shapes.values()):
        return None
    return shapes["lora_B"][0] * shapes["lora_A"][1]
