"""A state dict in a torch.save file: what `save_16bit_model` and `torch.save(model.state_dict())`
write, and `save_pretrained(safe_serialization=False)` in shards.

    pytorch_model.bin                       one file, or
    pytorch_model-00001-of-00002.bin, ...   several, and
    pytorch_model.bin.index.json            {"metadata": {...}, "weight_map": {tensor: file}}

or, of FSDP's FULL_STATE_DICT, what accelerate and the HF Trainer save:

    pytorch_model_fsdp.bin                  the first model
    pytorch_model_fsdp_1.bin                the second, where a run trains two

or an adapter of PEFT before safetensors: adapter_model.bin. Its optimizer lies beside it or in the
same file: `reshard.formats.optimizer_file`.

Names that share a storage (tied weights) are one tensor with aliases. Read off DeepSpeed 0.19.8
(`save_16bit_model`, runtime/engine.py), transformers 4.57 and accelerate 1.15 (`save_fsdp_model`,
utils/fsdp_utils.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import starmap
from pathlib import Path
from shlex import quote
from typing import Any

from reshard.containers.distributed import Decoder, is_distributed
from reshard.containers.torch import Opaque, TensorRef, TorchFile
from reshard.containers.torch import read as read_torch
from reshard.containers.torch.named import entries_of, lists_of_tensors
from reshard.containers.torch.write import lay_out_state_dict
from reshard.core.catalog import Catalog, Origin
from reshard.core.findings import Finding, lists_left_out, objects_unread, part_left_out
from reshard.core.plan import OutputFile
from reshard.core.regex import regex
from reshard.core.state import ReadState
from reshard.core.tensors import Entry, Record, whole
from reshard.errors import (
    FormatError,
    IncompleteError,
    NamesError,
    UnsupportedError,
    listed,
    shown,
)
from reshard.formats import (
    MODEL,
    NOT_MODEL,
    OPTIMIZER_KEYS,
    RUN_STATE,
    Selection,
    TensorToWrite,
    numbered,
    of_several,
    optimizer_file,
    weight_map,
)
from reshard.formats.signs import is_meta
from reshard.storage.local import Sources, child
from reshard.storage.paths import is_file, is_folder, matching, names

_SINGLE = "pytorch_model.bin"
_INDEX = "pytorch_model.bin.index.json"
_ADAPTER = "adapter_model.bin"
_FSDP = regex(r"pytorch_model_fsdp(?:_(\d+))?\.bin")
_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
# Levels of dicts that are looked into.
_MAX_DEPTH = 4
_Dict = dict[Any, Any]
# A key of every file that DeepSpeed's engine writes.
_DEEPSPEED = "ds_version"


def detect(path: Path) -> str | None:
    """A torch.save file, or a folder with a whole model in one and no safetensors."""
    if is_file(path):
        return "a torch.save file" if path.suffix in _SUFFIXES and not is_meta(path) else None
    if any(matching(path, "*.safetensors")):
        return None
    found = [_INDEX] if is_file(path / _INDEX) else _singles(path)
    return f"it holds {found[0]}" if found else None


def read(path: Path, sources: Sources, selection: Selection) -> Catalog:
    """The tensors of the state dict; the findings list what else it holds."""
    entries: dict[str, Entry] = {}
    records: list[Record] = []
    findings: list[Finding] = []
    files = _files(path, sources)
    optimizer: ReadState | None = None
    for file in files:
        content = read_torch(sources.open(file))
        records += content.records
        part, state = _state_dict(file, content, sources, selection.prefix)
        findings += starmap(part_left_out, _beside(content.value, part).items())
        for name, entry in entries_of(state).items():
            if name in entries:
                raise FormatError("it is stored in two files.", path=file, tensor=name)
            entries[name] = entry
        findings += _rounded(file, content)
        findings += [Finding("no-checksums", warning, file.name) for warning in content.warnings]
        if content.opaque:
            findings.append(objects_unread(content.opaque))
        lists = _lists(content.value)
        if lists:
            findings.append(lists_left_out(lists))
    order = [name for name, entry in entries.items() if entry.spec.dtype.floating]
    if len(files) == 1:
        read_before = tuple(dict.fromkeys(records))
        optimizer = optimizer_file.inside(
            content.value, files[0], entries, order, read_before, sources
        )
    if optimizer is None and is_folder(path):
        named = _FSDP.fullmatch(files[0].name)
        number = int(named[1] or 0) if named is not None else 0
        optimizer = optimizer_file.beside(path, number, entries, lambda: order, sources)
    return Catalog(
        format="torch",
        origin=Origin(root=path, framework="torch"),
        entries=entries,
        records=tuple(dict.fromkeys(records)),
        findings=(
            *dict.fromkeys(findings),
            *of_several(path, _models(path), files[0].name, "file"),
        ),
        optimizer=optimizer,
    )


def lay_out_file(name: str, slots: Sequence[TensorToWrite]) -> OutputFile:
    """A torch.save file of a state dict, for consumers that load nothing else."""
    return lay_out_state_dict([spec for spec, _, _ in slots]).file(name, slots, table=name)


def _files(path: Path, sources: Sources) -> list[Path]:
    if is_file(path):
        return [path]
    if not is_file(path / _INDEX):
        return [child(path, next(iter(_singles(path)), _SINGLE), store=True)]
    located = weight_map.read(path, _INDEX, sources)
    if not located:
        raise FormatError("its weight_map names no file.", path=path / _INDEX)
    files = [child(path, name, store=True) for name in sorted(set(located.values()))]
    for file in files:
        if not is_file(file):
            raise IncompleteError(
                f"{_INDEX} lists it, but it is missing.",
                path=file,
                hint="Copy the missing shard.",
            )
    return files


def _singles(path: Path) -> list[str]:
    """The files of a folder that each hold a whole state dict; the first is meant."""
    named = [name for name in (_SINGLE, _ADAPTER) if is_file(path / name)]
    return named or _models(path)


def _models(path: Path) -> list[str]:
    """The files of accelerate's models in a folder, by their numbers."""
    if not is_folder(path):
        return []
    return numbered(names(path), _FSDP)


def _state_dict(
    path: Path, content: TorchFile, sources: Sources, prefix: str | None
) -> tuple[_Dict, dict[str, TensorRef]]:
    """The model's part and its tensors; their names keep what of `prefix` is a path to it."""
    value, before = content.value, ""
    if isinstance(value, dict):
        _refuse_part(path, value)
        if value.keys() == OPTIMIZER_KEYS:
            raise UnsupportedError(
                "it holds the state of an optimizer, but no model.",
                path=path,
                hint="Name the file that holds the model.",
            )
        value, before = _named_part(value, prefix)
        value = value if before else _model_part(value, path)
    found = _tensors(_whole(path, value, sources))
    if not isinstance(value, dict) or not found:
        raise _no_state_dict(path, content.value)
    for name, tensor in value.items():
        if isinstance(tensor, Opaque) and tensor.is_tensor and name not in found:
            raise UnsupportedError(
                f"it is {tensor.describe()}, which is not supported.",
                path=path,
                tensor=name if isinstance(name, str) else None,
            )
        if isinstance(tensor, TensorRef) and not isinstance(name, str):
            raise UnsupportedError(
                f"a tensor of its state dict has no name: its key is a {type(name).__name__}.",
                path=path,
            )
    return value, {before + name: tensor for name, tensor in found.items()}


def _no_state_dict(path: Path, value: object) -> UnsupportedError:
    others = list(_beside(value, None))
    if others:
        what = "reshard does not take these parts for the model unless you name one"
        hint = f"Name the part to read: --prefix {quote(shown(others[0]))}."
        return UnsupportedError(f"{what}: {listed(others)}.", path=path, hint=hint)
    return UnsupportedError(
        "it holds no state dict: no dict of names to tensors.",
        path=path,
        hint="Name a file that torch.save(model.state_dict(), ...) wrote.",
    )


def _beside(value: object, part: _Dict | None, depth: int = _MAX_DEPTH) -> dict[str, int]:
    """The omitted dicts of tensors that are not a run's state, with their numbers of tensors, by
    their dotted names: another model, such as `ema` or `reference`."""
    counts: dict[str, int] = {}
    for key, inner in value.items() if isinstance(value, dict) and depth else ():
        if not isinstance(key, str) or not isinstance(inner, dict) or inner is part:
            continue
        if _is_run_state(key):
            continue
        # A loss or a step that is stored as a tensor is not a weight.
        if tensors := sum(bool(tensor.shape) for tensor in _tensors(inner).values()):
            counts[key] = tensors
        else:
            within = _beside(inner, part, depth - 1)
            counts |= {f"{key}.{name}": count for name, count in within.items()}
    return counts


def _lists(value: object) -> list[str]:
    """The lists of tensors beside the run's state: an `_extra_state` may be one."""
    if not isinstance(value, dict):
        return []
    own = {key: inner for key, inner in value.items() if not _is_run_state(key)}
    return [*lists_of_tensors(own)]


def _is_run_state(key: object) -> bool:
    return key in OPTIMIZER_KEYS or (isinstance(key, str) and RUN_STATE.fullmatch(key) is not None)


def _named_part(value: _Dict, prefix: str | None) -> tuple[_Dict, str]:
    """The dict that the prefix leads to through nested ones, and how much of it did."""
    before = ""
    for step in prefix.removesuffix(".").split(".") if prefix else ():
        inner = value.get(step)
        if not isinstance(inner, dict):
            break
        value, before = inner, f"{before}{step}."
    return value, before


def _model_part(value: _Dict, path: Path) -> _Dict:
    """The dict that is the model's state dict, by the names that trainers use.

    Raises `NamesError` where it could be one of several.
    """
    for _ in range(_MAX_DEPTH):
        known = [key for key in MODEL if _holds_tensors(value.get(key))]
        inside = [
            key
            for key, inner in value.items()
            if isinstance(key, str) and not NOT_MODEL.fullmatch(key) and _holds_tensors(inner)
        ]
        # A step or a loss that is stored as a tensor beside the model is not a model.
        own = [tensor for tensor in value.values() if _is_tensor(tensor)]
        if not known and any(not isinstance(t, TensorRef) or t.shape for t in own):
            return value
        if not known and len(inside) > 1:
            raise NamesError(
                f"several parts of it could be the model: {', '.join(map(repr, inside))}.",
                path=path,
                hint="Name the one to read with --prefix.",
            )
        if not known and not inside:
            return value
        inner = value[(known or inside)[0]]
        if not isinstance(inner, dict):
            return value
        value = inner
    return value


def _holds_tensors(value: object, depth: int = _MAX_DEPTH) -> bool:
    """Whether a dict has tensors in it, or in a dict in it."""
    if not isinstance(value, dict) or not depth:
        return False
    return any(_is_tensor(v) or _holds_tensors(v, depth - 1) for v in value.values())


def _is_tensor(value: object) -> bool:
    return isinstance(value, TensorRef) or (
        isinstance(value, Opaque) and (value.is_tensor or is_distributed(value))
    )


def _whole(path: Path, value: object, sources: Sources) -> object:
    """The state dict, with distributed tensors that one rank holds completely as plain tensors.
    Raises `UnsupportedError` where the file holds only a part of one."""
    if not isinstance(value, dict) or not any(map(is_distributed, value.values())):
        return value
    decoder = Decoder(str(path), None, sources)
    whole_ones = dict(value)
    for name, tensor in value.items():
        if (
            not isinstance(name, str)
            or not isinstance(tensor, Opaque)
            or not is_distributed(tensor)
        ):
            continue
        local = decoder.decode(name, tensor)
        if len(local.fragments) != 1 or local.fragments[0].box != whole(local.shape):
            raise UnsupportedError(
                f"the file holds one rank's part of it, of {local.world or 'several'} ranks.",
                path=path,
                tensor=name,
                hint="Put the files of all ranks into one folder, with names that end in "
                "_rank0.pt, _rank1.pt and so on, and name the folder.",
            )
        whole_ones[name] = local.fragments[0].tensor
    return whole_ones


def _refuse_part(path: Path, value: Mapping[object, object]) -> None:
    """Refuse one rank's file of a training run whose weights lie in several.

    DeepSpeed's (runtime/engine.py, `save_checkpoint`) say so: ZeRO-3 leaves empty tensors where its
    partitions belong, tensor parallel ranks and experts have files of their own.
    """
    if _DEEPSPEED not in value:
        return
    module = _tensors(value.get("module"))
    partitioned = any(tensor.shape == (0,) for tensor in module.values())
    if (
        partitioned
        or not module
        or value.get("num_experts")
        or value.get("mp_world_size") not in (None, 1)
    ):
        raise UnsupportedError(
            "it is one of several files of a DeepSpeed checkpoint.",
            path=path,
            hint=f"Name the folder that holds it: {path.parent}.",
        )


def _rounded(path: Path, content: TorchFile) -> list[Finding]:
    """The finding that a model file of DeepSpeed's ZeRO-1 or 2 holds rounded weights."""
    value = content.value
    if not isinstance(value, dict) or _DEEPSPEED not in value or not value.get("param_shapes"):
        return []
    message = (
        f"{path} holds the weights in the type of the module; those in full precision are in the "
        f"optimizer's files: name the folder that holds it, {path.parent}."
    )
    return [Finding("rounded-weights", message, subject=path.name)]


def _tensors(value: object) -> dict[str, TensorRef]:
    if not isinstance(value, dict):
        return {}
    return {
        name: tensor
        for name, tensor in value.items()
        if isinstance(name, str) and isinstance(tensor, TensorRef)
    }
