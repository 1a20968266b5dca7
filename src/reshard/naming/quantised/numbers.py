"""Codes and their scales as one tensor: the numbers that they represent.

The names show which scales belong to which codes, and the shapes show which codes a scale covers.
Nothing is read here: the tensors are computed later (`core/arithmetic.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, cast

from msgspec import Struct
from msgspec.structs import replace

from reshard.core import rearrange
from reshard.core.arithmetic import computed
from reshard.core.dtypes import BFLOAT16, FLOAT32, UINT8, DType
from reshard.core.findings import Finding
from reshard.core.regex import regex
from reshard.core.scaled import Code, Scaled
from reshard.core.tensors import Entry, Shape
from reshard.errors import FormatError, IncompleteError, UnsupportedError
from reshard.naming.quantised.mx import BLOCK, E8M0, are_mx
from reshard.naming.quantised.stated import Statement, statement

_FP8 = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
# Two codes of four bits lie in a byte.
_PACKED = ("uint8", "int8", "float4_e2m1fn_x2")
_CODES = frozenset((*_FP8, *_PACKED))
# The edge of DeepSeek's blocks, for tensors without a config.
_USUAL_BLOCK = 128
# gpt-oss: [experts, rows, groups, 16] codes two a byte, [experts, rows, groups] scales.
_BLOCKS, _SCALES = "_blocks", "_scales"
# Other tensors of quantised modules: scales of activations and of the cache, and unused zero
# points.
_BESIDE = regex(
    r"(?:.*\.)?(?:(?:\w+_)?(?:input|activation|output)_(?:scale|scale_ub|scale_inv|global_scale|"
    r"zero_point)|[qkv]_scale|kv_scale|prob_output_scale|weight_zero_point)"
)


class Numbers(Struct, frozen=True):
    """A table of tensors in which the quantised ones are the numbers that they represent, as
    bfloat16.

    `kinds`: name of such a tensor -> what its codes are, in words. `left_out` are the scales and
    the other tensors that belong to the codes.
    """

    entries: Mapping[str, Entry]
    kinds: Mapping[str, str]
    left_out: tuple[str, ...] = ()
    stated: Statement | None = None

    @property
    def summary(self) -> str:
        """How many weights are of which kind, in words."""
        counts = Counter(self.kinds.values())
        return "; ".join(f"{count} in {kind}" for kind, count in counts.most_common())

    def exact(self) -> dict[str, Entry]:
        """The entries, those of `kinds` as float32: the unrounded products."""
        return {
            name: replace(entry, spec=replace(entry.spec, dtype=FLOAT32))
            if name in self.kinds
            else entry
            for name, entry in self.entries.items()
        }

    def finding(self, whose: str) -> Finding:
        """The finding that they are read as numbers; `whose`: the checkpoint's or the base's."""
        return Finding(
            "dequantised",
            f"{whose} weights are quantised ({self.summary}): reshard dequantises them, and the "
            "output has neither their scales nor a quantization_config.",
        )


def numbers(entries: Mapping[str, Entry], config: Mapping[str, Any]) -> Numbers:
    """Combine codes and scales. Other entries stay as they are, in their order.

    Raises `UnsupportedError` for codes or scales whose meaning is not known, `IncompleteError`
    for a code without its scale, `FormatError` for a scale beside a weight that is not a code.
    """
    return _Pairing(entries, statement(config)).result()


class _Pairing:
    def __init__(self, entries: Mapping[str, Entry], stated: Statement | None) -> None:
        self._entries = entries
        self._stated = stated
        self._scales: set[str] = set()
        self._kinds: dict[str, str] = {}

    def result(self) -> Numbers:
        made = self._entries
        if any(entry.spec.dtype.name in _CODES for entry in made.values()):
            made = {name: self._number(name, entry) for name, entry in made.items()}
        self._check_alone()
        if not self._kinds:
            return Numbers(self._entries, {}, stated=self._stated)
        beside = {name for name in self._entries if _BESIDE.fullmatch(name)}
        left_out = self._scales | beside
        kept = {entry.spec.name: entry for name, entry in made.items() if name not in left_out}
        return Numbers(kept, self._kinds, tuple(n for n in made if n in left_out), self._stated)

    def _number(self, name: str, entry: Entry) -> Entry:
        """The tensor that codes represent; any other as it is."""
        dtype = entry.spec.dtype.name
        if name.endswith(_BLOCKS) and dtype == "uint8":
            scales = self._entries.get(name.removesuffix(_BLOCKS) + _SCALES)
            if scales is not None:
                return self._gpt_oss(name.removesuffix(_BLOCKS), entry, scales)
        code = dtype if dtype in _FP8 else "float4_e2m1"
        if dtype not in _FP8 and dtype not in _PACKED:
            return entry
        own = _packed_name(name) if code == "float4_e2m1" else name
        for scale_name in _scale_names(name):
            scales = self._entries.get(scale_name)
            if scales is None or (code == "float4_e2m1" and not are_mx(entry, scales)):
                continue
            self._scales.add(scale_name)
            return self._scaled(own, entry, scales, cast(Code, code))
        return entry

    def _gpt_oss(self, name: str, codes: Entry, scales: Entry) -> Entry:
        """Experts' codes; the tensor is the transpose of the matrix that was quantised."""
        shape = codes.spec.shape
        if len(shape) != 4 or shape[3] * 2 != BLOCK or scales.spec.shape != shape[:3]:
            raise FormatError(
                f"codes of shape {shape} and scales of {scales.spec.shape} do not match.",
                tensor=codes.spec.name,
            )
        self._scales.add(scales.spec.name)
        packed = rearrange.reshape(codes, (*shape[:2], shape[2] * shape[3]))
        made = self._scaled(name, packed, scales, "float4_e2m1")
        return rearrange.transpose(made, 1, 2)

    def _scaled(self, name: str, codes: Entry, scales: Entry, code: Code) -> Entry:
        if not codes.spec.shape:
            raise self._misfit(codes, scales)
        per_byte = 2 if code == "float4_e2m1" else 1
        *leading, columns = codes.spec.shape
        shape = (*leading, columns * per_byte)
        if scales.spec.dtype.name == "uint8":
            scales = rearrange.reinterpret(scales, E8M0)
        if not scales.spec.dtype.floating:
            raise UnsupportedError(f"its scales are {scales.spec.dtype}.", tensor=codes.spec.name)
        grid = _grid(scales.spec.shape, len(shape))
        if grid is None:
            raise self._misfit(codes, scales)
        sizes = (
            _size(n, count, self._edge(dim - len(shape)))
            for dim, (n, count) in enumerate(zip(shape, grid, strict=True))
        )
        block = tuple(size or 0 for size in sizes)
        if 0 in block:
            raise self._misfit(codes, scales)
        source = Scaled(
            rearrange.reinterpret(codes, UINT8), rearrange.reshape(scales, grid), block, code
        )
        self._kinds[name] = _title(code, scales.spec.dtype, shape, block)
        like = replace(codes, spec=replace(codes.spec, name=name, dtype=BFLOAT16), fragments=())
        return computed(source, like)

    def _edge(self, dim: int) -> int | None:
        """The configured edge of a block along one of the last two dimensions."""
        if self._stated is None:
            return _USUAL_BLOCK if dim >= -2 else None
        return None if self._stated.block is None or dim < -2 else self._stated.block[dim]

    def _misfit(self, codes: Entry, scales: Entry) -> UnsupportedError:
        block = (
            ""
            if self._stated is None or self._stated.block is None
            else (f" and blocks of {self._stated.block[0]} x {self._stated.block[1]}")
        )
        return UnsupportedError(
            f"its scales {scales.spec.name!r} have shape {scales.spec.shape}, which does not "
            f"match codes of shape {codes.spec.shape}{block}.",
            tensor=codes.spec.name,
        )

    def _check_alone(self) -> None:
        """Refuse codes without scales, and scales beside what is not a code."""
        known = self._kinds.keys() | self._scales
        for name, entry in self._entries.items() if self._kinds or self._stated else ():
            if entry.spec.dtype.name in _FP8 and name not in known and not _BESIDE.fullmatch(name):
                raise IncompleteError(
                    f"it holds {entry.spec.dtype} codes, but it has no scale.",
                    tensor=name,
                    hint="Some files of the quantised model are missing; copy it again.",
                )
        stale = stale_scales(self._entries)
        if stale:
            name, scale = next(iter(stale.items()))
            raise FormatError(
                f"it is {self._entries[name].spec.dtype} and has a scale beside it, {scale!r}: "
                f"{len(stale)} weights are not codes, and their scales are of other weights.",
                tensor=name,
                hint="Name the model as it was released; reshard doctor says more about this one.",
            )


def stale_scales(entries: Mapping[str, Entry]) -> dict[str, str]:
    """Weight -> scale, of weights that are not codes and have a scale of codes beside them."""
    found: dict[str, str] = {}
    if not any(name.endswith(("_scale", "_scale_inv")) for name in entries):
        return found
    for name, entry in entries.items():
        if not entry.spec.dtype.floating or entry.spec.dtype.itemsize == 1:
            continue
        for scale in (f"{name}_scale_inv", f"{name}_scale"):
            if scale in entries and name.endswith((".weight", "_proj")):
                found[name] = scale
    return found


def _scale_names(name: str) -> Iterator[str]:
    """The names that a code's scales may have, the usual first."""
    own = _packed_name(name)
    yield f"{own}_scale_inv"
    yield f"{own}_scale"
    if own.endswith(".weight"):
        module = own.removesuffix("weight")
        yield f"{module}scale"  # DeepSeek-V4
        yield f"{module}qscale_weight"  # Mistral Large 4


def _packed_name(name: str) -> str:
    """The weight that packed codes are of (compressed-tensors' `weight_packed`)."""
    return name.removesuffix("_packed") if name.endswith(".weight_packed") else name


def _grid(scales: Shape, dims: int) -> Shape | None:
    """The scales' shape with as many dimensions as the tensor has: one scale, one for each row, or
    as they stand. ModelOpt keeps those of blocks as [rows, 1, columns, 1]."""
    if len(scales) == dims:
        return scales
    if len(scales) == 4 and dims == 2 and scales[1::2] == (1, 1):
        return scales[::2]
    if scales in ((), (1,)):
        return (1,) * dims
    if len(scales) == dims - 1:
        return (*scales, 1)
    return None


def _size(n: int, count: int, edge: int | None) -> int | None:
    """How many of `n` elements each of `count` scales covers; None where that is not known."""
    if count == 1:
        return n
    if count == n:
        return 1
    if not count:
        return None
    if edge is not None and -(-n // edge) == count:
        return edge
    size, rest = divmod(n, count)
    # Another edge than the config's is one of the usual ones.
    return size if not rest and size & (size - 1) == 0 else None


def _title(code: Code, scale: DType, shape: Shape, block: Shape) -> str:
    rows, columns = block[-2:] if len(block) > 1 else (1, block[-1])
    micro = (rows, columns) == (1, BLOCK) and scale.name == E8M0.name
    if code == "float4_e2m1":
        return "MXFP4"
    if micro:
        return "MXFP8"
    if block[-2:] == shape[-2:]:
        return "fp8 with one scale a tensor"
    if 1 in (rows, columns) and (rows, columns) != (1, 1):
        return "fp8 with one scale a row" if rows == 1 else "fp8 with one scale a column"
    return f"fp8 in blocks of {rows} x {columns}"
