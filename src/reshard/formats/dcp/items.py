"""Where the bytes of each chunk lie: inside a torch.save stream, a safetensors blob, a zstd frame.

An item of a `.distcp` file is a complete torch.save zip of one tensor; only its first and last
bytes are read to find the tensor in it. With `SerializationFormat.SAFETENSORS` the tensors of a
file are one safetensors blob at its end instead, and every item's offset is the blob's start
(torch 2.13, filesystem.py, `_write_item`). With the zstd extension each item is one zstd frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from reshard import safetensors_file, torchfile
from reshard.dtypes import DType
from reshard.errors import FormatError, IncompleteError, ReshardError, UnsupportedError
from reshard.formats.dcp.metadata import Location
from reshard.formats.dcp.shards import saved_offsets
from reshard.storage import Source, Sources, child
from reshard.tensors import Extent, FileRef, Record, Shape, TensorSpec

# Bytes. torch.save puts about 700 before the tensor of an item and 600 behind it, its directory
# included: one read of each end is all that an item takes.
_END_NBYTES = 1024
_ZIP = b"PK\3\4"
_COPY_AGAIN = "Copy the whole folder again; each rank wrote files of its own."


@dataclass(frozen=True, slots=True)
class Item:
    """A chunk's bytes. `strides` as in `Fragment`; `record` is the checksum its zip states."""

    extent: Extent
    strides: Shape | None = None
    record: Record | None = None


@dataclass(frozen=True, slots=True)
class _Blob:
    tensors: dict[str, tuple[TensorSpec, Extent]]
    offsets: dict[str, Shape]


class Items:
    """Finds the items of one checkpoint folder."""

    def __init__(self, folder: Path, sources: Sources) -> None:
        self._folder = folder
        self._sources = sources
        self._files: dict[str, Source] = {}
        self._blobs: dict[tuple[str, int], _Blob] = {}

    def locate(
        self, key: str, dtype: DType, offsets: Shape, sizes: Shape, location: Location
    ) -> Item:
        """The bytes of the chunk of tensor `key` that has `sizes` and begins at `offsets`.

        Raises `IncompleteError` (the file is missing or short), `FormatError` (the item is not
        what the metadata says), `UnsupportedError` (a transform that is not handled).
        """
        try:
            source = self._file(location.file)
            if location.transforms:
                _check_end(source, location)
                frame = self._sources.open(_frame(source, location))
                return _in_zip(frame, 0, frame.size, dtype, sizes)
            if source.read(location.offset, min(4, location.nbytes)) == _ZIP:
                _check_end(source, location)
                return _in_zip(source, location.offset, location.nbytes, dtype, sizes)
            return self._in_blob(
                source, location.offset, key, TensorSpec(key, dtype, sizes), offsets
            )
        except ReshardError as error:
            error.tensor = error.tensor or key
            raise

    def _file(self, name: str) -> Source:
        source = self._files.get(name)
        if source is None:
            path = child(self._folder, name)
            if not path.exists():
                raise IncompleteError(
                    "the checkpoint's metadata names it, and it is not there.",
                    path=path,
                    hint=_COPY_AGAIN,
                )
            source = self._files[name] = self._sources.open(path)
        return source

    def _in_blob(
        self, source: Source, start: int, key: str, chunk: TensorSpec, offsets: Shape
    ) -> Item:
        place = (source.ref.path, start)
        blob = self._blobs.get(place)
        if blob is None:
            file = safetensors_file.read(source, start)
            blob = self._blobs[place] = _Blob(dict(file.tensors), saved_offsets(file, place[0]))
        if key not in blob.tensors:
            raise IncompleteError("the file does not hold it.", path=place[0], hint=_COPY_AGAIN)
        spec, extent = blob.tensors[key]
        if (spec.dtype, spec.shape) != (chunk.dtype, chunk.shape):
            raise _other_tensor(place[0], spec.dtype, spec.shape, chunk.dtype, chunk.shape)
        if blob.offsets.get(key, offsets) != offsets:
            # Names are unique in a blob: of two chunks of one tensor, torch keeps the last.
            raise IncompleteError(
                f"the chunk at {offsets} was overwritten by the one at {blob.offsets[key]}: torch "
                "kept only one of the chunks that this rank held.",
                path=place[0],
            )
        return Item(extent)


class _Ends(Source):
    """A file of which the two ends of one item are in memory."""

    def __init__(self, source: Source, offset: int, nbytes: int) -> None:
        super().__init__(source.ref, None, source.identity, source.size)
        self._source = source
        head = min(nbytes, _END_NBYTES)
        tail = min(nbytes - head, _END_NBYTES)
        self._head = (offset, source.read(offset, head))
        self._tail = (offset + nbytes - tail, source.read(offset + nbytes - tail, tail))

    def read(self, offset: int, nbytes: int) -> bytes:
        for start, data in (self._head, self._tail):
            if start <= offset and offset + nbytes <= start + len(data):
                return data[offset - start : offset - start + nbytes]
        return self._source.read(offset, nbytes)


def _in_zip(source: Source, offset: int, nbytes: int, dtype: DType, sizes: Shape) -> Item:
    file = torchfile.read(_Ends(source, offset, nbytes), offset=offset, nbytes=nbytes)
    tensor = file.value
    if not isinstance(tensor, torchfile.TensorRef):
        raise FormatError(
            "its item holds no plain tensor.",
            path=source.ref.path,
            hint="The file is damaged, or was not written by torch.distributed.checkpoint.",
        )
    if (tensor.dtype, tensor.shape) != (dtype, sizes):
        raise _other_tensor(source.ref.path, tensor.dtype, tensor.shape, dtype, sizes)
    return Item(tensor.extent, tensor.strides, file.records[0] if file.records else None)


def _frame(source: Source, location: Location) -> FileRef:
    """A transformed item as a file of its own. Descriptors are `name[@domain][/version]`."""
    name, _, version = location.transforms[0].partition("/")
    known = name == "stream.zstd" and version.partition(".")[0] == "1"
    if not known or len(location.transforms) > 1:
        raise UnsupportedError(
            f"it went through {', '.join(location.transforms)} when it was saved; only "
            "stream.zstd/1 is undone.",
            path=source.ref.path,
            hint="Load it with the extension that wrote it and save it again without.",
        )
    return FileRef(source.ref.path, "zstd", location.offset, location.nbytes)


def _check_end(source: Source, location: Location) -> None:
    end = location.offset + location.nbytes
    if end > source.size:
        raise IncompleteError(
            f"bytes {location.offset} to {end} are needed, the file has {source.size}.",
            path=source.ref.path,
            hint="The file was cut off; copy it again or use another checkpoint.",
        )


def _other_tensor(
    path: str, dtype: DType, shape: Shape, wanted: DType, wanted_shape: Shape
) -> FormatError:
    return FormatError(
        f"its item is {dtype} {list(shape)}; the metadata says {wanted} {list(wanted_shape)}.",
        path=path,
        hint="The folder holds files of different saves; copy one of them whole.",
    )
