"""Universal checkpoints: what ds_to_universal makes of a save.

    ROOT/latest_universal                                the folder's name
    ROOT/<folder>/zero/<parameter>/fp32.pt               the whole master; moments beside it
    ROOT/<folder>/mp_rank_00_model_states.pt             stages 1 and 2: a copy of the save's file
    ROOT/<folder>/zero_pp_rank_0_mp_rank_00_model_states.pt   stage 3: copies, one a rank

    fp32.pt    stages 1 and 2: {"param": tensor in full shape, ...}
               stage 3: the tensor itself, flat; its shape stands in the model files

    AutoEP     all experts of a layer in one tensor, in the order of their numbers; the model file
               has rank 0's shape: {"param": [experts, ...], "is_expert_param": True,
               "ep_num_experts": experts, ...}

AutoEP is in autoep.py. Buffers and frozen parameters are read from the model files: where `zero/`
has them as well (DeepSpeed 0.19.8) they were cast to float32, which does not hold every integer.
Read off DeepSpeed 0.19.8 (checkpoint/ds_to_universal.py, autoep_universal.py) and files that it
wrote.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from msgspec.structs import replace

from reshard.containers.torch import TensorRef, TorchFile
from reshard.containers.torch import read as read_torch
from reshard.core.catalog import Catalog
from reshard.core.findings import Finding
from reshard.core.tensors import Entry, Record, Shape, TensorSpec
from reshard.errors import FormatError, IncompleteError, UnsupportedError, listed
from reshard.formats.deepspeed import autoep, proof, stage3, stages012
from reshard.formats.deepspeed.describe import describe
from reshard.formats.deepspeed.experts import holds_experts
from reshard.formats.deepspeed.files import Saved
from reshard.formats.deepspeed.flat import flat_entry
from reshard.formats.deepspeed.place import Location
from reshard.storage.local import Sources, child
from reshard.storage.paths import is_file, is_folder, listing


def catalog(location: Location, saved: Saved, sources: Sources) -> Catalog:
    """The masters of `zero/`, and what they leave from the model files."""
    model = saved.model[0]
    if any(holds_experts(group) for group in model.groups):
        raise UnsupportedError(
            "it is a universal checkpoint of a run with experts, which is not supported.",
            path=location.folder,
            hint="Convert the checkpoint that it was made from.",
        )
    entries: dict[str, Entry] = {}
    records: list[Record] = []
    experts = autoep.experts(model)
    saved = replace(saved, model=(autoep.with_routers(model), *saved.model[1:]))
    for name, shape in (item for group in model.groups for item in group.items()):
        path = child(child(child(location.folder, "zero"), name), "fp32.pt")
        if not is_file(path):
            raise IncompleteError(
                "it is missing.",
                path=path,
                tensor=name,
                hint="Copy the whole folder, or make the universal checkpoint again.",
            )
        file = read_torch(sources.open(path))
        count = experts.get(name)
        if count is not None:
            autoep.check(file, count, path, name)
            shape = (count, *shape[1:])
        entries[name] = master(name, shape, stored(file, path), path)
        records += file.records
    if location.partitioned_model:
        entries, findings = stage3.complete(entries, saved)
    else:
        proof.check_masters(model.module, entries, sources)
        entries, findings = stages012.complete(entries, saved), []
    findings = [*findings, *_unlisted(location, entries)]
    found = describe(location, saved, entries, findings)
    return replace(found, records=(*found.records, *records))


def _unlisted(location: Location, entries: Mapping[str, Entry]) -> Iterator[Finding]:
    """What lies in `zero/` and belongs to no tensor of the model files, as after copies of two."""
    known = {name for entry in entries.values() for name in entry.names}
    found = [path.name for path in listing(location.folder / "zero") if is_folder(path)]
    left = sorted(set(found) - known)
    if left:
        yield Finding(
            "universal-unlisted",
            f"zero/ holds {len(left)} parameters that the model files do not list, and they were "
            f"left out: {listed(left)}.",
        )


def stored(file: TorchFile, path: Path) -> TensorRef:
    value = file.value
    stored = value.get("param") if isinstance(value, dict) else value
    if not isinstance(stored, TensorRef) or stored.strides is not None:
        raise FormatError("it holds no master of a parameter.", path=path)
    return stored


def master(name: str, shape: Shape, stored: TensorRef, path: Path) -> Entry:
    """A master whose shape the model file states; the file has it in full shape or flat."""
    spec = TensorSpec(name, stored.dtype, shape)
    if stored.shape not in (shape, (spec.numel,)):
        raise FormatError(
            f"its shape is {stored.shape}, but {shape} in the model file: files of different "
            "saves are mixed.",
            path=path,
            tensor=name,
            hint="Make the universal checkpoint again.",
        )
    return flat_entry(spec, stored)
