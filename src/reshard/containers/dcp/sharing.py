"""Whether each item of a checkpoint has its own chunk and its own bytes.

If two items share a place, a damaged metadata gives it to the wrong tensor; if no chunk has a
place, the metadata lost its tensor. Keys that a checkpoint declares as names of one tensor (its
aliases) count as one item here. In a safetensors blob all items state the place of the whole blob,
and its header keeps them apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from reshard.containers.dcp.items import is_blob
from reshard.containers.dcp.metadata import Location, Metadata
from reshard.errors import FormatError
from reshard.storage.local import Sources, child


def check(metadata: Metadata, folder: Path, sources: Sources) -> None:
    """Refuse a checkpoint of which two items share bytes, or one is not a chunk's. The items must
    have been found, and the chunks must tile their tensors.

    Raises `FormatError`.
    """
    for key, offsets in metadata.unclaimed:
        at = "" if offsets is None else f" at {offsets}"
        raise FormatError(
            f"storage_data has a location for it{at}, but the state dict has no such chunk.",
            path=folder,
            tensor=key,
            hint="The metadata is damaged; copy it again, or use another checkpoint.",
        )
    files: dict[str, list[tuple[int, int, str, Location]]] = {}
    for key, place in _places(metadata):
        held = (place.offset, place.offset + place.nbytes, key, place)
        files.setdefault(place.file, []).append(held)
    for name, places in files.items():
        places.sort(key=lambda place: place[:2])
        for (start, end, key, first), (other, _, second, place) in pairwise(places):
            if other >= end or (other == start and _is_blob(folder, first, place, sources)):
                continue
            raise FormatError(
                f"bytes {other} to {end} of {name} also belong to {key!r}, and the metadata does "
                "not declare the two as one tensor.",
                path=folder,
                tensor=second,
                hint="The metadata is damaged; copy it again, or use another checkpoint.",
            )


def _places(metadata: Metadata) -> Iterator[tuple[str, Location]]:
    """Every item with its bytes; copies of a chunk by several ranks are separate items."""
    for key, tensor in metadata.tensors.items():
        for chunk in tensor.chunks:
            for copy in chunk.copies:
                yield key, copy
    for key, copies in metadata.objects.items():
        for copy in copies:
            yield key, copy


def _is_blob(folder: Path, first: Location, second: Location, sources: Sources) -> bool:
    transformed = first.transforms or second.transforms
    return not transformed and is_blob(sources.open(child(folder, first.file)), first)
