"""What every writer must do: about twenty tests that a format's test class inherits."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from msgspec.structs import replace

from reshard import formats
from reshard.core import dtypes
from reshard.core.catalog import Catalog
from reshard.core.dtypes import BFLOAT16, FLOAT32, DType
from reshard.core.plan import OutputFile, Plan, Texts
from reshard.core.tensors import (
    Entry,
    Extent,
    FileRef,
    Fragment,
    TensorSpec,
    flat,
    whole,
)
from reshard.formats import Selection, TensorToWrite
from reshard.formats.info import output_format
from reshard.storage.local import Sources
from reshard.testing import truth
from reshard.testing.truth import Array, Tensors
from reshard.transfer.commit import OutputFolder
from reshard.transfer.executor import Threads
from reshard.transfer.output import put_text

_UNBOUNDED = 5 * 10**9
# Bytes of a file, so that the tensors of `truth.ordinary` need several.
_SMALL = 4_000


class WriterConformance:
    """Inherit it as `Test...`, set `to`, and say in `load` how the real consumer reads.

    `to` is the value of `--to`. The tensors to be written lie in plain files of bytes, in two
    parts each, so that no reader is needed. `narrow` is a 16-bit dtype that the format can say,
    `lacks` names the dtypes that it cannot.
    """

    to: ClassVar[str]
    narrow: ClassVar[DType] = BFLOAT16
    lacks: ClassVar[tuple[str, ...]] = ()

    def load(self, folder: Path) -> Tensors:
        """Every tensor in `folder`, loaded without reshard by those for whom it is written."""
        raise NotImplementedError

    def lay_out(
        self, to_write: Sequence[TensorToWrite], max_file_nbytes: int = _UNBOUNDED
    ) -> tuple[tuple[OutputFile, ...], Texts]:
        return formats.writer(output_format(self.to)).lay_out(to_write, max_file_nbytes)

    def write(
        self,
        to_write: Sequence[TensorToWrite],
        folder: Path,
        *,
        max_file_nbytes: int = _UNBOUNDED,
        threads: int = 1,
    ) -> Path:
        """Lay out and write; returns `folder`."""
        files, texts = self.lay_out(to_write, max_file_nbytes)
        with Sources() as sources, OutputFolder(folder, "conformance") as output:
            Threads(threads).run(Plan(files), sources, output)
            for name, text in texts:
                put_text(output, name, text)
            output.commit()
        return folder

    def read_back(self, folder: Path) -> Catalog:
        with Sources() as sources:
            return formats.read(folder, sources, Selection())

    @pytest.fixture
    def tensors(self) -> Tensors:
        return truth.ordinary(self.lacks)

    @pytest.fixture
    def to_write(self, tensors: Tensors, tmp_path: Path) -> list[TensorToWrite]:
        return [stored(tmp_path, name, array) for name, array in tensors.items()]

    # The layout

    def test_literals_and_tensors_fill_each_file_exactly(
        self, to_write: list[TensorToWrite]
    ) -> None:
        for limit in (_UNBOUNDED, _SMALL):
            for file in self.lay_out(to_write, limit)[0]:
                parts = [(offset, len(literal)) for offset, literal in file.literals]
                parts += [(slot.offset, slot.spec.nbytes) for slot in file.slots]
                end = 0
                for offset, nbytes in sorted(part for part in parts if part[1]):
                    assert offset == end, file.name
                    end += nbytes
                assert end == file.nbytes

    def test_tensors_are_written_front_to_back(self, to_write: list[TensorToWrite]) -> None:
        for file in self.lay_out(to_write, _SMALL)[0]:
            offsets = [slot.offset for slot in file.slots]
            assert offsets == sorted(offsets)

    def test_every_tensor_is_laid_out_once_and_in_full(self, to_write: list[TensorToWrite]) -> None:
        numel: dict[str, int] = {}
        for file in self.lay_out(to_write, _SMALL)[0]:
            assert file.table == ""
            for slot in file.slots:
                assert slot.source.spec.shape == slot.spec.shape
                numel[slot.spec.name] = numel.get(slot.spec.name, 0) + slot.spec.numel
        assert numel == {spec.name: spec.numel for spec, _, _ in to_write}

    def test_file_names_are_plain_and_differ(self, to_write: list[TensorToWrite]) -> None:
        files, texts = self.lay_out(to_write, _SMALL)
        names = [file.name for file in files] + [name for name, _ in texts]
        assert len(set(names)) == len(names)
        assert all(Path(name).name == name for name in names)

    def test_files_are_bounded(self, to_write: list[TensorToWrite]) -> None:
        files, _ = self.lay_out(to_write, _SMALL)
        assert (len(files) == 1) == output_format(self.to).one_file
        if len(files) == 1:
            return
        for file in files:
            held = sum(slot.spec.nbytes for slot in file.slots)
            assert held <= _SMALL or len(file.slots) == 1, file.name

    def test_laying_out_opens_no_file(self, tensors: Tensors) -> None:
        nowhere = Path("/nowhere")
        to_write = [described(nowhere, name, array) for name, array in tensors.items()]
        files, _ = self.lay_out(to_write)
        assert sum(len(file.slots) for file in files) == len(tensors)

    def test_laying_out_twice_gives_the_same(self, to_write: list[TensorToWrite]) -> None:
        assert self.lay_out(to_write, _SMALL) == self.lay_out(to_write, _SMALL)

    def test_checksums_have_their_places(self, to_write: list[TensorToWrite]) -> None:
        for file in self.lay_out(to_write)[0]:
            for offset in (offset for slot in file.slots for offset in slot.crc_offsets):
                holders = [
                    literal[offset - start : offset - start + 4]
                    for start, literal in file.literals
                    if start <= offset and offset + 4 <= start + len(literal)
                ]
                assert holders == [bytes(4)], (file.name, offset)

    # What is written

    def test_files_have_the_size_that_was_planned(
        self, to_write: list[TensorToWrite], tmp_path: Path
    ) -> None:
        folder = self.write(to_write, tmp_path / "out", max_file_nbytes=_SMALL)
        files, texts = self.lay_out(to_write, _SMALL)
        planned = {file.name: file.nbytes for file in files}
        planned.update((name, len(text)) for name, text in texts)
        assert {path.name: path.stat().st_size for path in folder.iterdir()} == planned

    def test_checksums_are_those_of_the_bytes(
        self, to_write: list[TensorToWrite], tmp_path: Path
    ) -> None:
        folder = self.write(to_write, tmp_path / "out")
        for file in self.lay_out(to_write)[0]:
            data = (folder / file.name).read_bytes()
            for slot in file.slots:
                crc = zlib.crc32(data[slot.offset : slot.offset + slot.spec.nbytes])
                for offset in slot.crc_offsets:
                    assert data[offset : offset + 4] == crc.to_bytes(4, "little"), slot.spec.name

    def test_the_consumer_loads_it(
        self, tensors: Tensors, to_write: list[TensorToWrite], tmp_path: Path
    ) -> None:
        loaded = self.load(self.write(to_write, tmp_path / "out"))
        assert truth.differing(loaded, tensors) == []

    def test_the_consumer_loads_it_from_small_files(
        self, tensors: Tensors, to_write: list[TensorToWrite], tmp_path: Path
    ) -> None:
        loaded = self.load(self.write(to_write, tmp_path / "out", max_file_nbytes=_SMALL))
        assert truth.differing(loaded, tensors) == []

    def test_the_consumer_loads_a_single_tensor(self, tmp_path: Path) -> None:
        array = np.arange(6, dtype=np.float32).reshape(2, 3)
        arrays: list[Array] = [array, array[:0], np.array(7, np.int64)]
        for number, one in enumerate(arrays):
            to_write = [stored(tmp_path, f"t{number}", one)]
            loaded = self.load(self.write(to_write, tmp_path / f"out-{number}"))
            assert truth.differing(loaded, {f"t{number}": one}) == []

    def test_a_tensor_of_many_pieces(self, tmp_path: Path) -> None:
        """More than the engine moves at a time, and more than one piece of a chunked format."""
        array = np.arange(5 << 20, dtype=np.float32).reshape(-1, 1024)
        limit = array.nbytes // 3
        to_write = [stored(tmp_path, "large", array)]
        loaded = self.load(self.write(to_write, tmp_path / "out", max_file_nbytes=limit, threads=3))
        assert truth.differing(loaded, {"large": array}) == []

    def test_a_cast_on_the_way(self, tmp_path: Path) -> None:
        array = np.linspace(-3, 3, 40, dtype=np.float32).reshape(8, 5)
        spec, source, _ = stored(tmp_path, "w", array)
        to_write = [(replace(spec, dtype=self.narrow), source, None)]
        loaded = self.load(self.write(to_write, tmp_path / "out"))
        assert truth.differing(loaded, {"w": array.astype(self.narrow.numpy)}) == []

    def test_a_source_in_another_order(self, tmp_path: Path) -> None:
        """A matrix that is stored transposed, and cut into rows where the format cuts."""
        array = np.arange(6_000, dtype=np.float32).reshape(60, 100)
        path = tmp_path / "transposed"
        path.write_bytes(array.T.tobytes())
        spec = TensorSpec("w", FLOAT32, array.shape)
        extent = Extent(FileRef(str(path)), 0, array.nbytes)
        fragment = Fragment(whole(spec.shape), extent, FLOAT32, strides=(1, 60))
        to_write: list[TensorToWrite] = [(spec, Entry(spec, (fragment,)), None)]
        loaded = self.load(self.write(to_write, tmp_path / "out", max_file_nbytes=_SMALL))
        assert truth.differing(loaded, {"w": array}) == []

    def test_the_number_of_threads_changes_no_byte(
        self, to_write: list[TensorToWrite], tmp_path: Path
    ) -> None:
        found = []
        for threads in (1, 2, 5):
            folder = tmp_path / f"out-{threads}"
            self.write(to_write, folder, max_file_nbytes=_SMALL, threads=threads)
            found.append({path.name: path.read_bytes() for path in folder.iterdir()})
        assert found[0] == found[1] == found[2]

    def test_writing_again_changes_no_byte(
        self, to_write: list[TensorToWrite], tmp_path: Path
    ) -> None:
        one, other = (self.write(to_write, tmp_path / name) for name in ("one", "other"))
        assert {path.name: path.read_bytes() for path in one.iterdir()} == {
            path.name: path.read_bytes() for path in other.iterdir()
        }

    # Back again

    def test_it_is_detected(self, to_write: list[TensorToWrite], tmp_path: Path) -> None:
        folder = self.write(to_write, tmp_path / "out")
        assert list(formats.claims(folder)) == [output_format(self.to).name]

    def test_our_reader_gives_the_same(
        self, tensors: Tensors, to_write: list[TensorToWrite], tmp_path: Path
    ) -> None:
        folder = self.write(to_write, tmp_path / "out", max_file_nbytes=_SMALL)
        assert truth.differing(truth.held(self.read_back(folder)), tensors) == []


def stored(folder: Path, name: str, array: Array) -> TensorToWrite:
    """A tensor to be written, its bytes in two files of `folder`."""
    to_write = described(folder, name, array)
    data = array.tobytes()
    position = 0
    for fragment in to_write[1].fragments:
        nbytes = fragment.extent.nbytes
        path = Path(fragment.in_file.file.path)
        path.write_bytes(b"\xff" * fragment.extent.offset + data[position : position + nbytes])
        position += nbytes
    return to_write


def described(folder: Path, name: str, array: Array) -> TensorToWrite:
    """A tensor to be written, whose bytes would lie in two files of `folder`, flat."""
    dtype = dtypes.parse(array.dtype.name)
    spec = TensorSpec(name, dtype, array.shape)
    middle = array.size // 2
    fragments = []
    for part, (start, stop) in enumerate(((0, middle), (middle, array.size))):
        if start < stop:
            path = folder / f"{name}.{part}"
            extent = Extent(FileRef(str(path)), part * 3, (stop - start) * dtype.itemsize)
            box = flat(array.size, start, stop - start)
            fragments.append(Fragment(box, extent, dtype))
    return spec, Entry(spec, tuple(fragments)), None
