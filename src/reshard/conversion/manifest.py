"""`reshard.json`: where a folder's tensors came from, and the digest of each.

    {"reshard": version, "source": {format, tag, framework, version, world_size},
     "options": {...}, "names": {prefix, rules, tied, filled, ...},
     "tensors": {name: {"dtype": ..., "shape": [...], "xxh3_128": ...}},
     "beside": {file: {name: ...}}}

It holds no path and no time of day: the same input gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from reshard._version import __version__
from reshard.core.catalog import Origin
from reshard.core.tensors import TensorSpec
from reshard.errors import FormatError, NotFoundError
from reshard.storage import strict_json
from reshard.storage.local import Sources

MANIFEST = "reshard.json"
# Bytes that a stated tensor takes for each comma, colon and opening bracket of its lines.
_STATED_TOKEN_NBYTES = 45


class Stated(Struct, frozen=True, rename={"digest": "xxh3_128"}):
    """A tensor as `reshard.json` states it: dtype name, shape and xxh3-128 of its bytes."""

    dtype: str
    shape: tuple[int, ...]
    digest: str


class Manifest(Struct, frozen=True, omit_defaults=True):
    """The file: the tensors of the model and of each file beside it, the conversion's options, and
    what it did to the names."""

    reshard: str
    source: Mapping[str, Any]
    options: Mapping[str, Any]
    names: Mapping[str, Any]
    tensors: Mapping[str, Stated]
    beside: Mapping[str, Mapping[str, Stated]] = {}


def state(
    specs: list[TensorSpec], part: str, digests: Mapping[tuple[str, str], str]
) -> dict[str, Stated]:
    """What will be stated of each tensor of a part."""
    return {
        spec.name: Stated(spec.dtype.name, spec.shape, digests[part, spec.name])
        for spec in sorted(specs, key=lambda spec: spec.name)
    }


def render(
    source_format: str,
    origin: Origin,
    options: Mapping[str, Any],
    names: Mapping[str, Any],
    tensors: Mapping[str, Stated],
    beside: Mapping[str, Mapping[str, Stated]],
) -> bytes:
    """The file's bytes."""
    source = {
        "format": source_format,
        "framework": origin.framework,
        "version": origin.version,
        "tag": origin.tag,
        "world_size": origin.world_size,
    }
    content = Manifest(__version__, source, options, names, tensors, beside)
    return msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n"


def read(folder: Path, sources: Sources) -> Manifest:
    """What a folder's `reshard.json` states. Raises `NotFoundError`, `FormatError`."""
    path = folder / MANIFEST
    if not path.is_file():
        raise NotFoundError(
            f"it has no {MANIFEST}: it was not written by reshard.",
            path=folder,
            hint="Only folders that reshard wrote state their digests.",
        )
    text = strict_json.read_whole(sources.open(path), max_nbytes=strict_json.MAX_INDEX)
    try:
        return _parse(text, str(path))
    except FormatError as error:
        raise FormatError(
            f"it is damaged: {error.message}", path=path, hint="Convert the checkpoint again."
        ) from None


def _parse(text: bytes, path: str) -> Manifest:
    """The manifest that a text is; its tensors are parsed straight into their type.

    Parsed as any other JSON, 200,000 tensors would take more than the budget. Raises `FormatError`.
    """
    strict_json.check_budget(text, path, _STATED_TOKEN_NBYTES)
    fields = strict_json.parse_as(text, dict[str, msgspec.Raw], path)
    found: dict[str, Any] = {}
    members = len(fields)
    for name, raw in fields.items():
        if name == "tensors":
            found[name] = strict_json.parse_as(raw, dict[str, Stated], path)
            members += _members(found[name])
        elif name == "beside":
            found[name] = strict_json.parse_as(raw, dict[str, dict[str, Stated]], path)
            members += len(found[name]) + sum(map(_members, found[name].values()))
        else:
            found[name] = strict_json.parse(bytes(raw), path)
            members += strict_json.count_keys(bytes(raw))
    strict_json.check_members(text, members, path)
    try:
        return msgspec.convert(found, Manifest)
    except ValueError as error:
        raise FormatError(f"{error}.", path=path) from None


def _members(tensors: Mapping[str, Stated]) -> int:
    return len(tensors) * (1 + len(Stated.__struct_fields__))
