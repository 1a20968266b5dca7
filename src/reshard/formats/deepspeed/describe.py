"""What `inspect` says of a DeepSpeed checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from reshard.core.catalog import Catalog, Origin
from reshard.core.findings import Finding, objects_unread
from reshard.core.tensors import Entry
from reshard.formats.deepspeed.files import Saved
from reshard.formats.deepspeed.place import Location


def describe(
    location: Location,
    saved: Saved,
    entries: Mapping[str, Entry],
    findings: Sequence[Finding] = (),
) -> Catalog:
    """The catalog of a save. `findings` are those of its stage."""
    model = saved.model[0]
    notes = list(findings)
    if saved.opaque:
        notes.append(objects_unread(saved.opaque))
    plain = not saved.optim and not location.universal
    if plain and any(not name.startswith("F32") for name in _codes(entries)):
        notes.append(
            Finding(
                "masters-unnamed",
                "without ZeRO the fp32 masters are stored without names; the weights are read from "
                "the module, in the training dtype.",
            )
        )
    return Catalog(
        format="deepspeed",
        origin=Origin(
            root=location.folder,
            framework="deepspeed",
            version=model.version,
            tag=location.tag,
            world_size=len(saved.optim) or model.world_size,
            details={
                "zero_stage": model.stage if location.universal or model.flattened else saved.stage,
                "global_steps": model.steps,
                "groups": [len(group) for group in model.groups],
                "unread_objects": saved.opaque,
                **({"universal": True} if location.universal else {}),
            },
        ),
        entries=entries,
        records=saved.records,
        findings=tuple(notes),
    )


def _codes(entries: Mapping[str, Entry]) -> set[str]:
    return {entry.spec.dtype.safetensors for entry in entries.values() if entry.kind == "parameter"}
