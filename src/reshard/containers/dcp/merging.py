"""One checkpoint from the metadata of each rank."""

from __future__ import annotations

from reshard.containers.dcp.metadata import Chunk, Location, Metadata, Path, StoredTensor
from reshard.errors import FormatError


def merge(parts: list[Metadata], path: str) -> Metadata:
    """One checkpoint from the metadata that each rank wrote for itself (no collectives).

    Each rank lists its own chunks under the tensor's global shape. Chunks that several ranks
    hold (replicas) keep all their copies. Raises `FormatError` where ranks do not agree.
    """
    tensors: dict[str, StoredTensor] = {}
    objects: dict[str, tuple[Location, ...]] = {}
    paths: dict[str, Path] = {}
    for part in parts:
        for key, copies in part.objects.items():
            objects[key] = objects.get(key, ()) + copies
        for key, tensor in part.tensors.items():
            known = tensors.get(key)
            tensors[key] = tensor if known is None else _join(key, known, tensor, path)
        for key, steps in part.paths.items():
            if paths.setdefault(key, steps) != steps:
                raise FormatError("the ranks nest it differently.", path=path, tensor=key)
    versions = {part.version for part in parts}
    both = sorted(tensors.keys() & objects.keys())
    if both:
        raise FormatError(
            "it is a tensor on some ranks and another object on others.", path=path, tensor=both[0]
        )
    version = versions.pop() if len(versions) == 1 else None
    unclaimed = tuple(place for part in parts for place in part.unclaimed)
    flattened = any(part.flattened for part in parts)
    return Metadata(tensors, objects, paths, version, {}, unclaimed, flattened)


def _join(key: str, first: StoredTensor, second: StoredTensor, path: str) -> StoredTensor:
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        raise FormatError(
            f"the ranks disagree: {first.dtype} {first.shape} and {second.dtype} {second.shape}.",
            path=path,
            tensor=key,
            hint="The folder holds files from different saves.",
        )
    chunks = {chunk.offsets: chunk for chunk in first.chunks}
    for chunk in second.chunks:
        known = chunks.get(chunk.offsets)
        if known is not None and known.sizes == chunk.sizes:
            chunk = Chunk(chunk.offsets, chunk.sizes, known.copies + chunk.copies)
        elif known is not None:
            raise FormatError(
                f"two ranks hold chunks at {chunk.offsets}, of sizes {known.sizes} and "
                f"{chunk.sizes}.",
                path=path,
                tensor=key,
                hint="The folder holds files from different saves.",
            )
        chunks[chunk.offsets] = chunk
    return StoredTensor(first.dtype, first.shape, (*chunks.values(),))
