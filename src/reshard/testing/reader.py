"""What every reader must do: about twenty-five tests that a format's test class inherits."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import ClassVar, get_args

import numpy as np
import pytest
from msgspec import Struct, field
from msgspec.structs import replace

import reshard
from reshard import formats
from reshard.core.catalog import Catalog
from reshard.core.tensors import TensorKind
from reshard.core.tiling import check_tiling
from reshard.formats import Selection
from reshard.storage.local import Sources
from reshard.testing import truth
from reshard.testing.truth import Tensors

# Bytes that reading the 32 MiB of `truth.large` may take: headers, directories, the end of a zip.
MAX_METADATA_NBYTES = 2 << 20


class Sample(Struct, frozen=True, dict=True):
    """A checkpoint that reshard did not make, and what it holds.

    `path` is what a user would name. `tensors` has each stored tensor once, under its first name;
    `aliases` maps the other names of the same weights to it.
    """

    path: Path
    tensors: Tensors
    aliases: Mapping[str, str] = field(default_factory=dict)

    @property
    def files(self) -> list[Path]:
        """Every file of the checkpoint."""
        if self.path.is_file():
            return [self.path]
        return sorted(path for path in self.path.rglob("*") if path.is_file())


class ReaderConformance:
    """Inherit it as `Test...`, set `format`, and write a checkpoint in `make`.

    A format whose checkpoints cannot be made at will overrides the fixture `sample` instead.

    `unread` are patterns (of `Path.match`) of the checkpoint's files that the reader does not need:
    the result must be the same whatever happens to them. `dispensable` are those that may be
    missing, and must be sound where they are there. `lacks` names the dtypes that the format cannot
    hold.
    """

    format: ClassVar[str]
    unread: ClassVar[tuple[str, ...]] = ()
    dispensable: ClassVar[tuple[str, ...]] = ()
    lacks: ClassVar[tuple[str, ...]] = ()

    def make(self, folder: Path, tensors: Tensors) -> Path:
        """Write `tensors` into the empty `folder` without reshard; returns what a user names."""
        raise NotImplementedError

    def called(self, missing: Path) -> str:
        """A pattern that the error for a missing file must match: its name."""
        return re.escape(missing.name)

    @pytest.fixture
    def sample(self, tmp_path: Path) -> Sample:
        """The checkpoint that most tests read."""
        folder = tmp_path / "checkpoint"
        folder.mkdir()
        tensors = truth.ordinary(self.lacks)
        return Sample(self.make(folder, tensors), tensors)

    @pytest.fixture
    def large(self, tmp_path: Path) -> Path:
        """A checkpoint with much more weights than metadata."""
        if type(self).make is ReaderConformance.make:
            pytest.skip("its checkpoint is given; no larger one can be made")
        return self.make(tmp_path, truth.large())

    def read(self, path: Path) -> Catalog:
        """The catalog, by this format's reader alone."""
        with Sources() as sources:
            return formats.load(self.format).read(path, sources, Selection())

    # Detection

    def test_detect_says_why(self, sample: Sample) -> None:
        reason = formats.load(self.format).detect(sample.path)
        assert reason
        assert not reason.endswith(".")

    def test_no_other_format_claims_it(self, sample: Sample) -> None:
        assert list(formats.claims(sample.path)) == [self.format]

    def test_an_empty_folder_is_not_claimed(self, tmp_path: Path) -> None:
        assert formats.load(self.format).detect(tmp_path) is None

    def test_other_files_are_not_claimed(self, tmp_path: Path) -> None:
        _add_strangers(tmp_path)
        (tmp_path / "weights.npz").write_bytes(b"PK\x03\x04")
        for path in (tmp_path, *tmp_path.iterdir()):
            assert formats.load(self.format).detect(path) is None, path

    def test_detecting_opens_no_weights(self, large: Path) -> None:
        assert _bytes_read(lambda: formats.load(self.format).detect(large)) < MAX_METADATA_NBYTES

    # What is read

    def test_names(self, sample: Sample) -> None:
        catalog = self.read(sample.path)
        assert sorted(catalog.entries) == sorted(sample.tensors)
        assert all(entry.spec.name == name for name, entry in catalog.entries.items())

    def test_other_names_of_the_same_weights(self, sample: Sample) -> None:
        entries = self.read(sample.path).entries
        found = {alias: name for name, entry in entries.items() for alias in entry.aliases}
        assert found == dict(sample.aliases)

    def test_shapes(self, sample: Sample) -> None:
        entries = self.read(sample.path).entries
        found = {name: entry.spec.shape for name, entry in entries.items()}
        assert found == {name: array.shape for name, array in sample.tensors.items()}

    def test_dtypes(self, sample: Sample) -> None:
        entries = self.read(sample.path).entries
        found = {name: entry.spec.dtype.numpy for name, entry in entries.items()}
        assert found == {name: array.dtype for name, array in sample.tensors.items()}

    def test_values(self, sample: Sample) -> None:
        found = truth.held(self.read(sample.path))
        assert truth.differing(found, sample.tensors) == []

    def test_scalars_and_empty_tensors(self, sample: Sample) -> None:
        entries = self.read(sample.path).entries
        scalars = [name for name, array in sample.tensors.items() if array.ndim == 0]
        empty = [name for name, array in sample.tensors.items() if array.size == 0]
        assert scalars
        assert empty
        assert all(entries[name].spec.numel == 1 for name in scalars)
        assert all(not f.extent.nbytes for name in empty for f in entries[name].fragments)

    def test_every_tensor_is_tiled(self, sample: Sample) -> None:
        for entry in self.read(sample.path).entries.values():
            check_tiling(entry)

    def test_kinds(self, sample: Sample) -> None:
        kinds = {entry.kind for entry in self.read(sample.path).entries.values()}
        assert kinds <= set(get_args(TensorKind))

    def test_bytes_lie_inside_files_of_the_checkpoint(self, sample: Sample) -> None:
        catalog = self.read(sample.path)
        files = {str(path): path.stat().st_size for path in sample.files}
        for entry in catalog.entries.values():
            for fragment in entry.fragments:
                extent = fragment.in_file
                assert extent.offset >= 0
                assert extent.offset + extent.nbytes <= files[extent.file.path], entry.spec.name
        for record in catalog.records:
            extent = record.extent
            assert extent.offset + extent.nbytes <= files[extent.file.path]

    def test_the_catalog_says_where_it_is_from(self, sample: Sample) -> None:
        catalog = self.read(sample.path)
        assert catalog.format == self.format
        assert catalog.origin.framework
        root, named = catalog.origin.root.resolve(), sample.path.resolve()
        assert root.is_relative_to(named) or named.is_relative_to(root)
        json.dumps(dict(catalog.origin.details))

    def test_reading_twice_gives_equal_catalogs(self, sample: Sample) -> None:
        once, again = (replace(self.read(sample.path), optimizer=None) for _ in range(2))
        assert once == again

    def test_reading_opens_no_weights(self, large: Path) -> None:
        assert _bytes_read(lambda: self.read(large)) < MAX_METADATA_NBYTES

    def test_reading_changes_nothing(self, sample: Sample) -> None:
        before = _state(sample.path.parent)
        self.read(sample.path)
        assert _state(sample.path.parent) == before

    def test_strangers_are_ignored(self, sample: Sample) -> None:
        before = self.read(sample.path)
        _add_strangers(sample.path if sample.path.is_dir() else sample.path.parent)
        after = self.read(sample.path)
        assert (after.entries, after.records) == (before.entries, before.records)

    # Through the library

    def test_the_library_gives_the_same_values(self, sample: Sample) -> None:
        checkpoint = reshard.open(sample.path)
        assert checkpoint.format == self.format
        found = {name: tensor.numpy() for name, tensor in checkpoint.tensors.items()}
        tied = {alias: sample.tensors[name] for alias, name in sample.aliases.items()}
        assert truth.differing(found, {**sample.tensors, **tied}) == []

    def test_it_converts(self, sample: Sample, tmp_path: Path) -> None:
        report = reshard.convert(sample.path, tmp_path / "out")
        assert report.verified
        found = {name: t.numpy() for name, t in reshard.open(tmp_path / "out").tensors.items()}
        assert truth.differing(found, sample.tensors) == []

    def test_torch_is_not_needed(self, sample: Sample) -> None:
        code = (
            "import sys, reshard\n"
            "names = list(reshard.open(sys.argv[1]).tensors)\n"
            "assert names and not {'torch', 'safetensors', 'deepspeed'} & set(sys.modules)\n"
        )
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run([sys.executable, "-c", code, str(sample.path)], check=True, env=environment)

    # What is wrong with a file is said, and the file is named

    def test_a_missing_file(self, sample: Sample, tmp_path: Path) -> None:
        for copy, file in self._copies(sample, tmp_path):
            file.unlink()
            self._refused(sample, copy, file)

    def test_a_file_that_was_cut_off(self, sample: Sample, tmp_path: Path) -> None:
        for copy, file in self._copies(sample, tmp_path):
            size = file.stat().st_size
            for kept in (size - 1, size // 2, 3, 0):
                os.truncate(file, kept)
                self._refused(sample, copy, file)

    def test_a_file_of_other_content(self, sample: Sample, tmp_path: Path) -> None:
        random = np.random.default_rng(0)
        for copy, file in self._copies(sample, tmp_path):
            file.write_bytes(random.bytes(file.stat().st_size))
            self._refused(sample, copy, file)

    def test_a_folder_in_place_of_a_file(self, sample: Sample, tmp_path: Path) -> None:
        for copy, file in self._copies(sample, tmp_path):
            file.unlink()
            file.mkdir()
            self._refused(sample, copy, file)

    def test_a_named_pipe_in_place_of_a_file(self, sample: Sample, tmp_path: Path) -> None:
        for copy, file in self._copies(sample, tmp_path):
            file.unlink()
            os.mkfifo(file)
            self._refused(sample, copy, file)

    def _copies(self, sample: Sample, tmp_path: Path) -> Iterator[tuple[Path, Path]]:
        """For each file of the checkpoint a copy of the whole, and that file in it."""
        root = sample.path if sample.path.is_dir() else sample.path.parent
        for number, file in enumerate(sample.files):
            copied = tmp_path / f"copy-{number}" / root.name
            shutil.copytree(root, copied, copy_function=os.link)
            mine = copied / file.relative_to(root)
            mine.unlink()
            shutil.copyfile(file, mine)
            yield (copied if sample.path.is_dir() else copied / sample.path.name), mine

    def _refused(self, sample: Sample, copy: Path, file: Path) -> None:
        """The copy, whose `file` is damaged, is refused and `file` named; or needs it not."""
        needless = self.unread if file.is_file() else self.unread + self.dispensable
        if any(file.match(pattern) for pattern in needless):
            found = truth.held(self.read(copy))
            assert truth.differing(found, sample.tensors) == []
            return
        with pytest.raises(reshard.ReshardError) as caught:
            reshard.open(copy)
        if isinstance(caught.value, reshard.NotFoundError) and not formats.claims(copy):
            return  # what is left is not a checkpoint of any format, and cannot say what it lacks
        called = re.escape(file.name) if file.exists() else self.called(file)
        assert re.search(called, str(caught.value)), caught.value


def _add_strangers(folder: Path) -> None:
    """Files that occur in any checkpoint folder and mean nothing."""
    (folder / "README.md").write_text("# notes\n", encoding="utf-8")
    (folder / ".DS_Store").write_bytes(b"\x00\x00\x00\x01Bud1")
    (folder / "training_args.json").write_text("{}", encoding="utf-8")
    (folder / "runs").mkdir()
    (folder / "runs" / "events.out.tfevents.1700000000.host").write_bytes(b"\x18\x00")


def _state(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Mode, modification time and content of everything below a folder."""
    return {
        str(path): (
            path.stat().st_mode,
            path.stat().st_mtime_ns,
            path.read_bytes() if path.is_file() else b"",
        )
        for path in (folder, *folder.rglob("*"))
    }


def _bytes_read(work: Callable[[], object]) -> int:
    """Bytes that this process read from files while it did `work`, the second time it does it."""
    counters = Path("/proc/self/io")
    if not counters.is_file():
        pytest.skip("this system does not count the bytes that a process reads")
    work()  # imports what it needs
    before = _counted(counters)
    work()
    return _counted(counters) - before


def _counted(counters: Path) -> int:
    """`rchar` of /proc/PID/io: bytes of all reads, those from the page cache included."""
    return int(counters.read_text().split("rchar:")[1].split()[0])
