"""`reshard.json`: where a folder's tensors came from, and the digest of each.

    {"reshard": version, "source": {format, tag, framework, version, world_size},
     "options": {...}, "names": {prefix, rules, tied, filled, ...},
     "tensors": {name: {"dtype": ..., "shape": [...], "xxh3_128": ...}},
     "beside": {file: {name: ...}}}

It holds no path and no time of day: the same input gives the same bytes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct

from reshard._version import __version__
from reshard.catalog import Origin
from reshard.errors import FormatError, NotFoundError
from reshard.storage import Sources
from reshard.tensors import TensorSpec

MANIFEST = "reshard.json"
# A million tensors' lines, in bytes.
_MAX_NBYTES = 256 << 20


class Stated(Struct, frozen=True):
    """A tensor as `reshard.json` states it: dtype name, shape and xxh3-128 of its bytes."""

    dtype: str
    shape: tuple[int, ...]
    digest: str


class Manifest(Struct, frozen=True):
    """The tensors of the model and of each file beside it, the conversion's options, and what it
    did to the names: the last two as they stand in the file."""

    tensors: Mapping[str, Stated]
    beside: Mapping[str, Mapping[str, Stated]]
    options: Mapping[str, Any]
    names: Mapping[str, Any]


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
    content: dict[str, Any] = {
        "reshard": __version__,
        "source": {
            "format": source_format,
            "framework": origin.framework,
            "version": origin.version,
            "tag": origin.tag,
            "world_size": origin.world_size,
        },
        "options": dict(options),
        "names": dict(names),
    }
    sections = {name: json.dumps(value, indent=1, ensure_ascii=False).replace("\n", "\n ")
                for name, value in content.items()}  # fmt: skip
    sections["tensors"] = _object({name: _rendered(t, 2) for name, t in tensors.items()}, 1)
    if beside:
        files = {
            file: _object({name: _rendered(t, 3) for name, t in stated.items()}, 2)
            for file, stated in beside.items()
        }
        sections["beside"] = _object(files, 1)
    return (_object(sections, 0) + "\n").encode()


# `json.dumps` with an indent takes 1.5 KB and 20 us a tensor: these few lines a tenth.


def _rendered(tensor: Stated, depth: int) -> str:
    pad = "\n" + " " * (depth + 2)
    sizes = f"[{pad}{f',{pad}'.join(map(str, tensor.shape))}{pad[:-1]}]" if tensor.shape else "[]"
    return _object(
        {"dtype": f'"{tensor.dtype}"', "shape": sizes, "xxh3_128": f'"{tensor.digest}"'}, depth
    )


def _object(values: Mapping[str, str], depth: int) -> str:
    """A JSON object of values that are JSON, as `json.dumps(.., indent=1)` has it so deep."""
    if not values:
        return "{}"
    pad = "\n" + " " * (depth + 1)
    items = (f"{json.dumps(k, ensure_ascii=False)}: {v}" for k, v in values.items())
    return f"{{{pad}{f',{pad}'.join(items)}{pad[:-1]}}}"


def read(folder: Path, sources: Sources) -> Manifest:
    """What a folder's `reshard.json` states. Raises `NotFoundError`, `FormatError`."""
    path = folder / MANIFEST
    if not path.is_file():
        raise NotFoundError(
            f"it has no {MANIFEST}: it was not written by reshard.",
            path=folder,
            hint="Only folders that reshard wrote state their digests.",
        )
    source = sources.open(path)
    text = source.read(0, min(source.size, _MAX_NBYTES))
    try:
        content = json.loads(text, object_hook=_stated)
        beside = content.get("beside", {}).items()
        return Manifest(
            _parsed(content["tensors"]),
            {file: _parsed(tensors) for file, tensors in beside},
            content["options"],
            content["names"],
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise FormatError("it is damaged.", path=path) from None


_FIELDS = {"dtype", "shape", "xxh3_128"}


def _stated(raw: dict[str, Any]) -> object:
    """A tensor as soon as its object is read: the dicts of all at once take 600 bytes each."""
    if raw.keys() != _FIELDS:
        return raw
    return Stated(sys.intern(raw["dtype"]), tuple(raw["shape"]), raw["xxh3_128"])


def _parsed(raw: Mapping[str, Any]) -> dict[str, Stated]:
    """The tensors of a section. Raises `TypeError` where it holds anything else."""
    if not all(isinstance(tensor, Stated) for tensor in raw.values()):
        raise TypeError
    return dict(raw)
