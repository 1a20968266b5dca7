"""`reshard.json`: where a folder's tensors came from, and the digest of each.

    {"reshard": version, "source": {format, tag, framework, version, world_size},
     "options": {...}, "names": {prefix, rules, tied, filled, ...},
     "tensors": {name: {"dtype": ..., "shape": [...], "xxh3_128": ...}},
     "beside": {file: {name: ...}},
     "files": {file: {"nbytes": ..., "xxh3_128": ... unless it holds tensors}}}

It holds no path and no time of day: the same input gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import xxhash
from msgspec import Struct

from reshard._version import __version__
from reshard.core.catalog import Origin
from reshard.core.plan import Plan
from reshard.core.tensors import TensorSpec
from reshard.errors import FormatError, NotFoundError
from reshard.storage.local import Source, Sources

MANIFEST = "reshard.json"
# A million tensors' lines, in bytes.
_MAX_NBYTES = 256 << 20
# Bytes of a file that is copied, in memory at once.
_PIECE = 4 << 20


class Stated(Struct, frozen=True, rename={"digest": "xxh3_128"}):
    """A tensor as `reshard.json` states it: dtype name, shape and xxh3-128 of its bytes."""

    dtype: str
    shape: tuple[int, ...]
    digest: str


class WrittenFile(Struct, frozen=True, omit_defaults=True, rename={"digest": "xxh3_128"}):
    """A file of the folder: its size and, unless it holds tensors, the xxh3-128 of its bytes."""

    nbytes: int
    digest: str = ""


class Manifest(Struct, frozen=True, omit_defaults=True):
    """The file: the tensors of the model and of each file beside it, the conversion's options, what
    it did to the names, and all other files of the folder."""

    reshard: str
    source: Mapping[str, Any]
    options: Mapping[str, Any]
    names: Mapping[str, Any]
    tensors: Mapping[str, Stated]
    beside: Mapping[str, Mapping[str, Stated]] = {}
    files: Mapping[str, WrittenFile] = {}


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
    files: Mapping[str, WrittenFile],
) -> bytes:
    """The file's bytes."""
    source = {
        "format": source_format,
        "framework": origin.framework,
        "version": origin.version,
        "tag": origin.tag,
        "world_size": origin.world_size,
    }
    content = Manifest(__version__, source, options, names, tensors, beside, files)
    return msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n"


def listed(plan: Plan, sources: Sources) -> dict[str, WrittenFile]:
    """The files that a plan writes, by name. Files that are copied are read for their digest."""
    files = {file.name: WrittenFile(file.nbytes) for file in plan.files}
    for name, text in plan.texts:
        files[name] = WrittenFile(len(text), xxhash.xxh3_128_hexdigest(text))
    for asset in plan.assets:
        source = sources.open(asset.path)
        files[asset.name] = WrittenFile(source.size, _digest(source))
    return dict(sorted(files.items()))


def file_digest(path: Path) -> str:
    """The xxh3-128 of a file's bytes, as `WrittenFile` states it."""
    with Sources() as sources:
        return _digest(sources.open(path))


def _digest(source: Source) -> str:
    hasher = xxhash.xxh3_128()
    for start in range(0, source.size, _PIECE):
        hasher.update(source.read(start, min(_PIECE, source.size - start)))
    return hasher.hexdigest()


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
        return msgspec.json.decode(text, type=Manifest)
    except (ValueError, RecursionError):
        raise FormatError("it is damaged.", path=path) from None
