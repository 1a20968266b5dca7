"""Whether each item of a checkpoint has its own chunk and its own bytes.

If two items share a place, a damaged metadata gives it to the wrong tensor; if no chunk has a
place, the metadata lost its tensor. Keys that a checkpoint declares as names of one tensor (its
aliases) count as one item here. In a safetensors blob all items state the place of the whole blob,
and its header keeps them apart.
"""

from __future__ import annotations

from array import array
from itertools import pairwise
from pathlib import Path

from reshard.containers.dcp.columns import StoredTensors, places
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
    if isinstance(metadata.tensors, StoredTensors) and metadata.tensors.apart():
        return
    files: dict[str, tuple[array[int], array[int], list[str]]] = {}
    transformed: set[tuple[str, int]] = set()
    for key, place in places(metadata):
        begins, ends, keys = files.setdefault(place.file, (array("Q"), array("Q"), []))
        begins.append(place.offset)
        ends.append(place.offset + place.nbytes)
        keys.append(key)
        if place.transforms:
            transformed.add((place.file, place.offset))
    for name, (begins, ends, keys) in files.items():
        for first, second in pairwise(_sorted(begins, ends)):
            start, end, other = begins[first], ends[first], begins[second]
            if other >= end:
                continue
            stored = other == start and (name, start) not in transformed
            first_place = Location(name, start, end - start)
            if stored and is_blob(sources.open(child(folder, name)), first_place):
                continue
            raise FormatError(
                f"bytes {other} to {end} of {name} also belong to {keys[first]!r}, and the "
                "metadata does not declare the two as one tensor.",
                path=folder,
                tensor=keys[second],
                hint="The metadata is damaged; copy it again, or use another checkpoint.",
            )


def _sorted(begins: array[int], ends: array[int]) -> list[int]:
    """The numbers of stretches of a file, by where they begin and end."""
    order = sorted(range(len(begins)), key=ends.__getitem__)
    order.sort(key=begins.__getitem__)
    return order
