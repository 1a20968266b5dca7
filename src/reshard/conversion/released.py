"""The output compared with releases: in their layout with `--names hub`, else how it differs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from msgspec.structs import replace

from reshard.conversion.base_model import CONFIG
from reshard.conversion.dtypes import as_entries, output_tensor
from reshard.conversion.output_model import OutputModel
from reshard.core.findings import Finding
from reshard.core.tensors import Shape
from reshard.errors import listed
from reshard.naming import fields, released, structure
from reshard.naming.layouts import Piece
from reshard.naming.memory import hub_pieces

_ORIENTATION = "Write the version into the base's config.json, as transformers_version."
# Names shown in a finding.
_SHOWN = 4


def in_layout(output: OutputModel, config: Mapping[str, Any]) -> OutputModel:
    """The output in the released layout. Raises `PlanError` where an orientation is not told."""
    entries = as_entries(output.model)
    compared = {t.spec.name: t.reference for t in output.model if t.reference is not None}
    found, patches = released.to_hub(entries, config)
    whole = len(compared) == len(entries)
    references = released.to_hub(compared, config)[0] if whole else compared
    model = [output_tensor(name, entry, references.get(name)) for name, entry in found.items()]
    return replace(output, model=model, patches={**output.patches, **patches})


def findings(output: OutputModel, config: Mapping[str, Any]) -> Iterator[Finding]:
    """How a planned model differs from every release, for all engines: layout, names, fields."""
    shapes = {tensor.spec.name: tensor.spec.shape for tensor in output.model}
    pieces = hub_pieces(shapes, config)  # 1.4 s for the names of 256 experts in 61 layers
    other = released.unreleased(shapes, config, pieces)
    if other is not None:
        message = (
            f"the output has the base's layout, which no release has: {other.words}. vLLM and "
            "others refuse some of these layouts."
        )
        yield Finding("base-layout", message)
    unknown = released.undecided(shapes, config)
    if unknown:
        message = (
            f"the orientation of {len(unknown)} stacked tensors is the base's, and neither shapes "
            "nor config tell which that is."
        )
        yield Finding("base-layout", message, subject=unknown[0], fix=_ORIENTATION)
    missing = fields.missing(config)
    if missing:
        message = f"{CONFIG} does not state {listed((f.path for f in missing), _SHOWN)}."
        yield Finding("base-config-fields", message, subject=CONFIG)
    yield from _unlike(shapes, config, pieces)


def _unlike(
    shapes: Mapping[str, Shape], config: Mapping[str, Any], pieces: Mapping[str, Piece]
) -> Iterator[Finding]:
    """Tensors that only the architecture has, or only the output."""
    found = structure.examine(shapes, config, pieces)
    parts = [
        (found.absent, "lacks"),
        (found.parts, "lacks every tensor of"),
        ((*found.strange, *found.heads), "has, beyond the class in the config,"),
        (tuple(f"{e.have} layers of {e.stated}" for e in found.layers), "has"),
    ]
    told = [f"it {what} {listed(names, _SHOWN)}" for names, what in parts if names]
    if told:
        message = f"the output is not what its architecture is: {' and '.join(told)}."
        yield Finding("output-unlike-architecture", message)
