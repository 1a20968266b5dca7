"""Hugging Face model folders: safetensors, whole or in shards with an index.

    model.safetensors                                one shard, or
    model-00001-of-00002.safetensors, ...            several, and
    model.safetensors.index.json                     {"metadata": .., "weight_map": {tensor: file}}

    a shard:  [u64 header length][header: JSON, padded with spaces to 8 bytes][tensor bytes]
    header:   {"__metadata__": .., name: {"dtype": "BF16", "shape": [..], "data_offsets": [a, b]}}

Read off safetensors 0.8.0 (safetensors/src/tensor.rs), transformers 5.23 and huggingface_hub 2.4.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from reshard.containers import safetensors as safetensors_file
from reshard.core import dtypes
from reshard.core.catalog import Catalog, Origin
from reshard.core.findings import Finding
from reshard.core.plan import OutputFile, Slot, pack
from reshard.core.regex import regex
from reshard.core.state import ReadState
from reshard.core.tensors import Entry, TensorSpec
from reshard.core.tiling import stored_whole
from reshard.errors import FormatError, IncompleteError, NotFoundError, listed
from reshard.formats import Description, Selection, TensorToWrite, optimizer_file
from reshard.formats import weight_map as shard_index
from reshard.naming import flat
from reshard.naming.lora.config import NAME as ADAPTER_CONFIG
from reshard.storage import strict_json
from reshard.storage.local import Sources, child
from reshard.storage.paths import is_file, is_folder, matching

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# torch/distributed/checkpoint/_hf_utils.py (torch 2.13): each rank's parts of tensors.
_DCP_SHARD = regex(r"shard-\d+-model-\d+-of-\d+\.safetensors")
# One shard of several, as save_pretrained names them.
_NUMBERED = regex(r"model-(\d{5})-of-(\d{5})\.safetensors")
# A PEFT adapter, Mistral's own names, the second and further models of an accelerate run.
_BESIDE = regex(r"(adapter_model|consolidated(-\d+-of-\d+)?|model_\d+)\.safetensors")


def detect(path: Path) -> str | None:
    """A `.safetensors` file, an index of such, or a folder with either."""
    if is_file(path) and path.name == INDEX:
        return f"it is a {INDEX}"
    if is_file(path):
        return "a safetensors file" if path.suffix == ".safetensors" else None
    if is_file(path / INDEX):
        return f"it holds {INDEX}"
    if _shards(path):
        return "it holds safetensors files"
    return None


def description(path: Path) -> Description | None:
    """What a folder with an adapter is called; others are models."""
    if not is_adapter(path):
        return None
    return Description(
        "an adapter of PEFT",
        "Merge it with: reshard convert SRC DST --base BASE --fill-from-base.",
    )


def read(path: Path, sources: Sources, selection: Selection) -> Catalog:
    """The tensors of a model folder, or of one file."""
    folder = path.parent if is_file(path) else path
    listed = is_folder(path) or path.name == INDEX
    located = _located(folder, sources) if listed else {path.name: None}
    entries: dict[str, Entry] = {}
    for name in located:
        expected, located[name] = located[name], None  # the entries have the names from here on
        shard = read_file(child(folder, name, store=True), sources)
        found = {entry.spec.name: entry for entry in shard}
        del shard
        if expected is not None and expected != found.keys():
            raise _index_mismatch(folder / name, expected, set(found))
        twice = entries.keys() & found.keys()
        if twice:
            raise FormatError("it is stored in two files.", path=folder / name, tensor=min(twice))
        if entries:
            entries.update(found)
        else:
            entries = found  # a table of 200,000 takes 10 MB
        del found  # before the next is read
    return Catalog(
        format="huggingface",
        origin=Origin(root=path, framework="safetensors", details={"files": sorted(located)}),
        entries=entries,
        findings=_unread(folder, located) if is_folder(path) else (),
        optimizer=_optimizer(folder, entries, sources) if listed else None,
    )


def _optimizer(folder: Path, entries: Mapping[str, Entry], sources: Sources) -> ReadState | None:
    """What reads the optimizer's state beside the model. Its numbers count the parameters in the
    order of the live module, which safetensors files do not keep."""

    def order() -> list[str] | None:
        there = is_file(folder / "config.json")
        return flat.in_order(entries, read_config(folder, sources)) if there else None

    return optimizer_file.beside(folder, 0, entries, order, sources)


def read_file(path: Path, sources: Sources) -> list[Entry]:
    """The tensors of one safetensors file. Raises what the container's reader raises."""
    found = safetensors_file.read(sources.open(path)).tensors
    return [stored_whole(spec, extent) for spec, extent in found.each()]


def _unread(folder: Path, located: Collection[str]) -> tuple[Finding, ...]:
    """Which weights beside the model were not read: an adapter, or accelerate's other
    models (accelerate/checkpointing.py, save_accelerator_state)."""
    others = [n for n in _shards(folder) if n not in located and _BESIDE.fullmatch(n)]
    if not others:
        return ()
    message = (
        f"{folder} also holds {listed(others)}, not read with {min(located)}. To convert such a "
        "file, name it."
    )
    return (Finding("weights-unread", message, subject=others[0]),)


def read_config(folder: Path, sources: Sources) -> dict[str, Any]:
    """The model's `config.json`. Raises `NotFoundError` where there is none."""
    path = folder / "config.json"
    if is_adapter(folder):
        raise NotFoundError(
            "it holds a PEFT adapter, but no model.",
            path=folder,
            hint="Name the model that it was trained on, which adapter_config.json states as "
            "base_model_name_or_path.",
        )
    if not is_file(path):
        raise NotFoundError(
            "the base model has no config.json.",
            path=folder,
            hint="Name the folder of the Hugging Face model that the training started from.",
        )
    return strict_json.read_object(sources.open(path))


def is_adapter(folder: Path) -> bool:
    """Whether a folder is what PEFT's `save_pretrained` writes: an adapter without a model."""
    return is_file(folder / ADAPTER_CONFIG) and not is_file(folder / "config.json")


def lay_out(
    slots: Sequence[TensorToWrite], max_shard_nbytes: int
) -> tuple[tuple[OutputFile, ...], tuple[tuple[str, bytes], ...]]:
    """Shards and index for tensors given as (spec, source, reference), in state dict order.

    Returns the shards and the small files (the index, where there is more than one shard). Names,
    distribution and bytes are those of `save_pretrained` for the same state dict.
    """
    by_name = {slot[0].name: slot for slot in slots}
    shards = pack([spec for spec, _, _ in slots], max_shard_nbytes)
    files = []
    for number, specs in enumerate(shards, start=1):
        name = SINGLE
        if len(shards) > 1:
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        files.append(_shard(name, specs, by_name))
    return tuple(files), index(files) if len(files) > 1 else ()


def index(files: Sequence[OutputFile]) -> tuple[tuple[str, bytes], ...]:
    """The index of the model's files, by its name.

    A single file has one too if heads lie beside it: vLLM and sglang load every `*.safetensors` of
    a folder without an index. transformers loads `model.safetensors` first, with an index or
    without.
    """
    held = {slot.spec.name: (file.name, slot.spec) for file in files for slot in file.slots}
    content = {
        "metadata": {
            "total_parameters": sum(spec.numel for _, spec in held.values()),
            "total_size": sum(spec.nbytes for _, spec in held.values()),
        },
        "weight_map": {},
    }
    # As json.dumps writes it, but line by line: its lists of parts took a kilobyte a tensor.
    start, end = json.dumps(content, indent=2, sort_keys=True).split("{}")
    text = bytearray(f"{start}{{".encode())
    separator = "\n    "
    for tensor in sorted(held):
        text += f"{separator}{json.dumps(tensor)}: {json.dumps(held[tensor][0])}".encode()
        separator = ",\n    "
    text += f"\n  }}{end}\n".encode()
    return ((INDEX, bytes(text)),)


def lay_out_file(name: str, slots: Sequence[TensorToWrite]) -> OutputFile:
    """One safetensors file beside the model: reward heads, an adapter."""
    by_name = {slot[0].name: slot for slot in slots}
    return replace(_shard(name, [spec for spec, _, _ in slots], by_name), table=name)


def _shard(
    name: str, specs: Sequence[TensorSpec], by_name: Mapping[str, TensorToWrite]
) -> OutputFile:
    # The order of safetensors' own writer: widest types first, so that every tensor is aligned.
    ordered = sorted(specs, key=lambda spec: (-spec.dtype.itemsize, _RANK[spec.dtype], spec.name))
    header = _header(ordered)
    slots = []
    offset = len(header)
    for spec in ordered:
        _, source, reference = by_name[spec.name]
        slots.append(Slot(offset, spec, source, reference=reference))
        offset += spec.nbytes
    return OutputFile(name, offset, ((0, header),), tuple(slots))


def _header(specs: Sequence[TensorSpec]) -> bytes:
    """The bytes of a shard before its tensors, which follow each other in this order.

    Written tensor by tensor: as one value, the header of 200,000 took 600 bytes a tensor.
    """
    text = bytearray(8)
    text += b'{"__metadata__":{"format":"pt"}'
    offset = 0
    for spec in specs:
        stated = {
            "dtype": spec.dtype.safetensors,
            "shape": _stored_shape(spec),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        text += f",{_encoded(spec.name)}:{_encoded(stated)}".encode()
        offset += spec.nbytes
    text += b"}"
    text += b" " * (-len(text) % 8)
    text[:8] = (len(text) - 8).to_bytes(8, "little")
    return bytes(text)


_encoded = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


# safetensors sorts by its Dtype enum, descending (tensor.rs: `BOOL` is the smallest).
_ENUM = ("BOOL", "F4", "F6_E2M3", "F6_E3M2", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0",
         "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "C64",
         "F64", "I64", "U64")  # fmt: skip
_RANK = {dtype: -_ENUM.index(dtype.safetensors) for dtype in dtypes.ALL}


def _shards(folder: Path) -> list[str]:
    """The safetensors files of a folder, but for those of DCP's writer, which hold parts."""
    names = sorted(path.name for path in matching(folder, "*.safetensors"))
    return [name for name in names if not _DCP_SHARD.fullmatch(name)]


def _located(folder: Path, sources: Sources) -> dict[str, set[str] | None]:
    """The shards of a folder, each with the tensors that the index says it holds.

    Without an index these are the files that transformers loads; a folder may hold others besides
    (Mistral's `consolidated.safetensors`).
    """
    if not is_file(folder / INDEX):
        names = _shards(folder)
        if SINGLE in names:
            return {SINGLE: None}
        numbered = [name for name in names if _NUMBERED.fullmatch(name)]
        _check_numbers(folder, numbered)
        return dict.fromkeys(numbered or names)
    located: dict[str, set[str] | None] = {}
    for tensor, name in weight_map(folder, sources).items():
        tensors = located.setdefault(name, set())
        if tensors is not None:
            tensors.add(tensor)
    for name in located:
        if not is_file(child(folder, name, store=True)):
            raise IncompleteError(
                f"{INDEX} lists it, but it is missing.",
                path=folder / name,
                hint="Download or copy the missing shard.",
            )
    return located


def weight_map(folder: Path, sources: Sources) -> dict[str, str]:
    """The index of a folder: tensor -> file. Raises `FormatError` where it holds no such table."""
    return shard_index.read(folder, INDEX, sources)


def _check_numbers(folder: Path, names: Sequence[str]) -> None:
    """Raise `IncompleteError` unless all shards are there that one of them counts."""
    counts = {match[2] for name in names if (match := _NUMBERED.fullmatch(name))}
    if len(counts) != 1:
        return  # the check of the tensors finds two sets: it finds each tensor in two files
    count = counts.pop()
    lost = {f"model-{n:05d}-of-{count}.safetensors" for n in range(1, int(count) + 1)} - {*names}
    if lost:
        raise IncompleteError(
            f"only {len(names)} of {int(count)} shards exist; {min(lost)} is missing.",
            path=folder,
            hint="Download or copy the missing shards.",
        )


def _stored_shape(spec: TensorSpec) -> list[int]:
    if spec.dtype.name == "float4_e2m1fn_x2":
        return [*spec.shape[:-1], spec.shape[-1] * 2]
    return list(spec.shape)


def _index_mismatch(path: Path, expected: set[str], names: set[str]) -> FormatError:
    lost, extra = sorted(expected - names), sorted(names - expected)
    return FormatError(
        f"{INDEX} lists {len(expected)} tensors in it, but it holds {len(names)}; not in the "
        f"file: {listed(lost, 5) or 'none'}; not in the index: {listed(extra, 5) or 'none'}.",
        path=path,
        hint="The index belongs to other files; copy the folder again.",
    )
