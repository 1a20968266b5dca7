"""The safetensors container, as a file or at the end of one; only the header is read, no tensor.

    [u64 header length][header: JSON, padded with spaces][tensor bytes, one after another]
    header:  {"__metadata__": {..}, name: {"dtype": "BF16", "shape": [..], "data_offsets": [a, b]}}

Checked more strictly than safetensors 0.8.0 (safetensors/src/tensor.rs) checks: no key twice, no
shape whose size overflows, and the tensors fill the rest of the file without gap or overlap. Also
refused: more than `tensors.MAX_DIMS` dimensions, and names that are not Unicode.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import msgspec
from msgspec import Struct

from reshard.containers.torch.sniff import HEAD_NBYTES, not_wanted
from reshard.core import dtypes
from reshard.core.tensors import MAX_NUMEL, Extent, FileRef, Shape, TensorSpec, is_shape
from reshard.errors import (
    FormatError,
    IncompleteError,
    ReshardError,
    UnsupportedError,
    brief,
)
from reshard.storage import strict_json
from reshard.storage.source import Source

# safetensors' own limit on a header (MAX_HEADER_SIZE), in bytes.
MAX_HEADER_NBYTES = 100_000_000
_METADATA = b'{"__metadata__":{'
# Bytes of it; writers put a line there.
_MAX_METADATA = 1 << 16
# Bytes that a tensor of a header takes for each comma, colon and opening bracket, eleven of them.
_STATED_TOKEN_NBYTES = 45


class SafetensorsFile(Struct, frozen=True):
    """A header: the tensors in the order it lists them, each with the bytes that hold it."""

    metadata: Mapping[str, str]
    tensors: _Tensors


class _Stated(Struct, gc=False):
    """What a header says of a tensor."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class _Metadata(Struct, rename={"metadata": "__metadata__"}):
    """The part of a header that is not a tensor."""

    metadata: msgspec.Raw


def read(source: Source, start: int = 0) -> SafetensorsFile:
    """The safetensors container in bytes `[start, source.size)` of a file.

    Raises `IncompleteError` where the file is too short, `FormatError` where a rule is broken,
    `UnsupportedError` for a dtype that is not known.
    """
    path = source.ref.path
    data, text = _header(source, start)
    table, metadata = _parsed(text, path)
    del text
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError("its __metadata__ is not a table of strings.", path=path)
    specs: dict[str, TensorSpec] = {}
    begins, ends = array("Q"), array("Q")
    alike: dict[tuple[str, Shape], tuple[TensorSpec, int]] = {}  # layers repeat: one for all
    expected, in_order = 0, True
    for name in list(table):
        raw = table.pop(name)  # its memory serves the next: a header may list 200,000 tensors
        spec, begin, end, nbytes = _checked(path, name, raw, alike)
        specs[name] = spec
        begins.append(begin)
        ends.append(end)
        in_order = in_order and begin == expected and end == begin + nbytes
        expected = end
    if not in_order:
        expected = _end(specs, begins, ends, path)
    if data + expected != source.size:
        problem = IncompleteError if source.size < data + expected else FormatError
        raise problem(
            f"its header describes {data + expected} bytes, the file has {source.size}.",
            path=path,
            hint="Copy or download the file again.",
        )
    return SafetensorsFile(metadata, _Tensors(specs, source.ref, data, begins))


def _checked(
    path: str, name: str, raw: Any, alike: dict[tuple[str, Shape], tuple[TensorSpec, int]]
) -> tuple[TensorSpec, int, int, int]:
    """A tensor of a header, where it begins and ends, and its size in bytes.

    `alike`: dtype and shape -> the first tensor that has them, and its size.
    """
    if not isinstance(raw, _Stated):
        spec = parse_tensor(path, name, raw)
        return spec, *raw["data_offsets"], spec.nbytes
    begin, end = raw.data_offsets
    known = alike.get((raw.dtype, raw.shape))
    if known is None or not (0 <= begin < MAX_NUMEL and 0 <= end < MAX_NUMEL):
        stated = {"dtype": raw.dtype, "shape": raw.shape, "data_offsets": raw.data_offsets}
        spec = parse_tensor(path, name, stated)
        nbytes = spec.nbytes
        alike[raw.dtype, raw.shape] = spec, nbytes
        return spec, begin, end, nbytes
    first, nbytes = known
    return TensorSpec(name, first.dtype, first.shape), begin, end, nbytes


def _end(specs: Mapping[str, TensorSpec], begins: array[int], ends: array[int], path: str) -> int:
    """Where the tensors end, which are listed in another order than that of their bytes.

    Raises `FormatError` where there is a gap or an overlap, or a tensor has another size.
    """
    names = [*specs]
    expected = 0
    for place in sorted(range(len(names)), key=lambda place: (begins[place], ends[place])):
        begin, end, spec = begins[place], ends[place], specs[names[place]]
        if begin != expected or end - begin != spec.nbytes:
            raise FormatError(
                f"its data_offsets are {begin} to {end}, but must be {expected} to "
                f"{expected + spec.nbytes}.",
                path=path,
                tensor=spec.name,
            )
        expected = end
    return expected


class _Tensors(Mapping[str, tuple[TensorSpec, Extent]]):
    """The tensors of a header; where each lies is a number of 8 bytes until somebody asks."""

    def __init__(
        self, specs: Mapping[str, TensorSpec], file: FileRef, data: int, begins: array[int]
    ) -> None:
        self._specs = specs
        self._file = file
        self._data = data
        self._begins = begins
        self._places: dict[str, int] = {}

    def __getitem__(self, name: str) -> tuple[TensorSpec, Extent]:
        if not self._places:
            self._places = {each: place for place, each in enumerate(self._specs)}
        return self._one(self._specs[name], self._begins[self._places[name]])

    def _one(self, spec: TensorSpec, begin: int) -> tuple[TensorSpec, Extent]:
        return spec, Extent(self._file, self._data + begin, spec.nbytes)

    def each(self) -> Iterator[tuple[TensorSpec, Extent]]:
        """All of them, in order."""
        return map(self._one, self._specs.values(), self._begins)

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)


def _header(source: Source, start: int) -> tuple[int, bytes]:
    """Where the tensors' bytes begin, and the header."""
    path = source.ref.path
    if source.size - start < 8:
        raise IncompleteError(
            f"a safetensors file has at least 8 bytes; this file has {source.size - start}.",
            path=path,
            hint="Copy or download the file again.",
        )
    length = int.from_bytes(source.read(start, 8), "little")
    if not 0 < length <= min(MAX_HEADER_NBYTES, source.size - start - 8):
        other = _other_kind(source, start)
        if other is not None:
            raise other
    if length > MAX_HEADER_NBYTES:
        raise FormatError(
            f"it is not a safetensors file: its header would have {length} bytes.", path=path
        )
    text = source.read(start + 8, length)
    if not text.startswith(b"{"):
        raise _bad_start(text, path)
    return start + 8 + length, text


def _parsed(text: bytes, path: str) -> tuple[dict[str, Any], object]:
    """What a header says of each tensor, and its `__metadata__`. Raises `FormatError`.

    As JSON of any kind, the header of 200,000 tensors takes more than the budget, so one that is
    spelt as writers spell it is parsed straight into its type. Any other is read as JSON.
    """
    with suppress(FormatError):
        strict_json.check_budget(text, path, _STATED_TOKEN_NBYTES)  # before anything is copied
        start, raw, rest = b"{", b"{}", text
        if text.startswith(_METADATA):
            raw = bytes(strict_json.parse_as(text, _Metadata, path).metadata)
            start = b'{"__metadata__":' + raw
            skipped = len(start) + text.startswith(b",", len(start))
            rest = b"".join((b"{", memoryview(text)[skipped:]))
        if len(raw) < _MAX_METADATA and text.startswith(start):
            table: dict[str, Any] = strict_json.parse_records(rest, _Stated, path)
            if "__metadata__" not in table:
                return table, strict_json.parse_object(raw, path)
    header = strict_json.parse_object(text, path)
    return header, header.pop("__metadata__", {})


def _other_kind(source: Source, start: int) -> ReshardError | None:
    """The error for a file that is known to be something else, as a Git LFS pointer."""
    nbytes = source.size - start
    head = source.read(start, min(HEAD_NBYTES, nbytes))
    error = not_wanted(head, nbytes, source.ref.path, "a safetensors file")
    known = head[8:9] != b"{" and not isinstance(error, FormatError)
    return error if known else None


def _bad_start(text: bytes, path: str) -> FormatError:
    if text.lstrip().startswith(b"{"):
        return FormatError(
            "its header begins with white space; a safetensors header begins with '{'.",
            path=path,
            hint="Load it with the safetensors library, which accepts that, and save it again.",
        )
    return FormatError(
        f"it is not a safetensors file: its header begins with {brief(text[:8])}, not with '{{'.",
        path=path,
        hint="The file is damaged or is not what its name says.",
    )


def parse_tensor(path: str, name: str, raw: Any) -> TensorSpec:
    """One tensor of a header, checked. Raises `FormatError`, `UnsupportedError` (the dtype)."""
    try:
        dtype = dtypes.from_safetensors(raw["dtype"])
        shape = raw["shape"]
        begin, end = raw["data_offsets"]
        possible = is_shape([*shape])
    except UnsupportedError as error:
        raise UnsupportedError(error.message, path=path, tensor=name) from None
    except (KeyError, TypeError, ValueError):
        raise FormatError("its entry in the header is malformed.", path=path, tensor=name) from None
    if not possible or not all(type(n) is int and 0 <= n < MAX_NUMEL for n in (begin, end)):
        place = f"{brief(begin)} to {brief(end)}"
        raise FormatError(
            f"shape {brief(shape)} at bytes {place} is impossible.", path=path, tensor=name
        )
    if dtype.name == "float4_e2m1fn_x2":
        # safetensors counts 4-bit values, torch and reshard pairs of them.
        if not shape or shape[-1] % 2:
            raise FormatError(
                f"shape {shape} cannot be stored as pairs of F4 values.", path=path, tensor=name
            )
        shape = [*shape[:-1], shape[-1] // 2]
    return TensorSpec(name, dtype, tuple(shape))
