"""Where the bytes of each chunk lie: inside a torch.save stream, a safetensors blob, a zstd frame.

An item of a `.distcp` file is a complete torch.save zip of one tensor. With
`SerializationFormat.SAFETENSORS` the tensors of a file are one safetensors blob at its end
instead, and every item's offset is the blob's start (torch 2.13, filesystem.py, `_write_item`).
With the zstd extension each item is one zstd frame of such a zip.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from msgspec import Struct

from reshard.containers import safetensors as safetensors_file
from reshard.containers.dcp.metadata import Location
from reshard.containers.dcp.shards import saved_offsets
from reshard.containers.dcp.zips import StoredItem, Windows, Zips, ends_of_frame
from reshard.core.tensors import Extent, FileRef, Shape, TensorSpec
from reshard.errors import FormatError, IncompleteError, ReshardError, UnsupportedError
from reshard.storage.local import Sources, child
from reshard.storage.paths import exists
from reshard.storage.source import Source

_ZIP = b"PK\3\4"
# The first byte of a safetensors header, or of one that is refused for its white space.
_HEADER = (b"{", b" ", b"\n", b"\t", b"\r")
# Bytes that a zip may have beside its tensor; torch's have less than 2 KiB.
_MAX_ZIP_NBYTES = 64 << 10
_COPY_AGAIN = "Copy the whole folder again; each rank wrote files of its own."


class _Blob(Struct, frozen=True):
    """The safetensors part of a file, and where each of its tensors begins in the whole one."""

    tensors: Mapping[str, tuple[TensorSpec, Extent]]
    offsets: Mapping[str, Shape]


class Items:
    """Finds the items of one checkpoint folder."""

    def __init__(self, folder: Path, sources: Sources) -> None:
        self._folder = folder
        self._sources = sources
        self._files: dict[str, Source] = {}
        self._windows: dict[str, Windows] = {}
        self._blobs: dict[tuple[str, int], _Blob] = {}
        self._zips = Zips()

    def locate(self, chunk: TensorSpec, offsets: Shape, location: Location) -> StoredItem:
        """The bytes of a chunk: `chunk` has its tensor's key, and its own shape.

        Raises `IncompleteError` (the file is missing or short), `FormatError` (the item is not
        what the metadata says), `UnsupportedError` (a transform that is not supported).
        """
        try:
            item = self._find(chunk, offsets, location)
            if (item.dtype, item.shape) != (chunk.dtype, chunk.shape):
                raise FormatError(
                    f"its item is {item.dtype} {list(item.shape)}; the metadata says "
                    f"{chunk.dtype} {list(chunk.shape)}.",
                    path=item.extent.file.path,
                    hint="The folder holds files from different saves; copy one save completely.",
                )
        except ReshardError as error:
            error.tensor = error.tensor or chunk.name
            raise
        return item

    def _find(self, chunk: TensorSpec, offsets: Shape, location: Location) -> StoredItem:
        source = self._file(location.file)
        if location.transforms:
            _check_end(source, location)
            ref = _frame(source, location)
            limit = chunk.nbytes + _MAX_ZIP_NBYTES
            return self._zips.locate(ends_of_frame(source, ref, self._sources.stream(ref), limit))
        if self._is_known_blob(source, location):
            return self._in_blob(source, location.offset, chunk.name, offsets)
        windows = self._windows.get(location.file)
        if windows is None:
            windows = self._windows[location.file] = Windows(source)
        ends = windows.ends(location.offset, location.nbytes)
        if not ends.head.startswith(_ZIP):
            return self._in_blob(source, location.offset, chunk.name, offsets)
        with item_at(source, location.offset):
            return self._zips.locate(ends)

    def promised_all(
        self, nbytes: Sequence[int], places: Sequence[Sequence[Location]]
    ) -> list[Extent]:
        """As many bytes of each item as its chunk takes, of the first of its copies: those of a
        catalog that is never read.

        Raises `IncompleteError` where a file is missing or short, of any copy.
        """
        files = self._files
        extents: list[Extent] = []
        for number, copies in zip(nbytes, places, strict=True):
            for place in copies:
                source = files.get(place.file) or self._file(place.file)
                if not place.transforms and place.offset + place.nbytes > source.size:
                    self._is_known_blob(source, place)
            place = copies[0]
            extents.append(Extent(files[place.file].ref, place.offset, number))
        return extents

    def _is_known_blob(self, source: Source, location: Location) -> bool:
        """Whether a place is known to be that of a blob; what is stated of its end is not checked.

        Raises `IncompleteError` where the file ends before an item does.
        """
        if (source.ref.path, location.offset) in self._blobs:
            return True
        if location.offset + location.nbytes <= source.size:
            return False
        if not is_blob(source, location):
            _check_end(source, location)
        return True

    def _file(self, name: str) -> Source:
        source = self._files.get(name)
        if source is None:
            path = child(self._folder, name)
            if not exists(path):
                raise IncompleteError(
                    "the checkpoint's metadata lists this file, but it is missing.",
                    path=path,
                    hint=_COPY_AGAIN,
                )
            source = self._files[name] = self._sources.open(path)
        return source

    def _in_blob(self, source: Source, start: int, key: str, offsets: Shape) -> StoredItem:
        place = (source.ref.path, start)
        blob = self._blobs.get(place)
        if blob is None:
            with item_at(source, start):
                if source.read(start + 8, 1) not in _HEADER:
                    raise FormatError("it is neither a torch.save file nor a safetensors file.")
                file = safetensors_file.read(source, start)
            blob = self._blobs[place] = _Blob(file.tensors, saved_offsets(file, place[0]))
        if key not in blob.tensors:
            raise IncompleteError("the file does not hold it.", path=place[0], hint=_COPY_AGAIN)
        if blob.offsets.get(key, offsets) != offsets:
            # Names are unique in a blob: of two chunks of one tensor, torch keeps the last.
            raise IncompleteError(
                f"the chunk at {offsets} was overwritten by the one at {blob.offsets[key]}: torch "
                "kept only one of the chunks that this rank held.",
                path=place[0],
            )
        spec, extent = blob.tensors[key]
        return StoredItem(spec.dtype, spec.shape, None, extent, None)


@contextmanager
def item_at(source: Source, offset: int) -> Iterator[None]:
    """Say of a file that holds no item at a place of the metadata that it may be another's: files
    of two ranks that were exchanged are sound in themselves."""
    try:
        yield
    except (FormatError, IncompleteError) as error:
        raise type(error)(
            f"at byte {offset}, where the metadata has an item, the file holds none that can be "
            f"read ({error.message.removesuffix('.')}): it is damaged, or it is the file of "
            "another rank or of another save.",
            path=source.ref.path,
            tensor=error.tensor,
            hint=_COPY_AGAIN,
        ) from None


def is_blob(source: Source, location: Location) -> bool:
    """Whether a place is that of a safetensors blob; else it is that of a zip.

    Raises `IncompleteError` where the file ends before it.
    """
    return source.read(location.offset, min(len(_ZIP), location.nbytes)) != _ZIP


def _frame(source: Source, location: Location) -> FileRef:
    """A transformed item as a file of its own. Descriptors are `name[@domain][/version]`."""
    name, _, version = location.transforms[0].partition("/")
    known = name == "stream.zstd" and version.partition(".")[0] == "1"
    if not known or len(location.transforms) > 1:
        raise UnsupportedError(
            f"it was saved with the transforms {', '.join(location.transforms)}; reshard supports "
            "only stream.zstd/1.",
            path=source.ref.path,
            hint="Load it with the extension that wrote it, and save it again without the "
            "transform.",
        )
    return FileRef(source.ref.path, "zstd", location.offset, location.nbytes)


def _check_end(source: Source, location: Location) -> None:
    end = location.offset + location.nbytes
    if end > source.size:
        raise IncompleteError(
            f"bytes {location.offset} to {end} are needed, but the file has {source.size}: it was "
            "truncated, or it belongs to another rank.",
            path=source.ref.path,
            hint=_COPY_AGAIN,
        )
