"""The ledger of checksums: pieces read in any order, twice, or not at all."""

from __future__ import annotations

import itertools
import random
import zlib
from pathlib import Path

import pytest

from reshard.core.tensors import Extent, FileRef, Record
from reshard.errors import FormatError
from reshard.storage.local import Sources
from reshard.transfer.checksums import Ledger

_BEFORE, _NBYTES = 64, 5000


class _File:
    """A file of one record, and a ledger of it."""

    def __init__(self, folder: Path, *, damage: int | None = None) -> None:
        self._content = random.Random(0).randbytes(_BEFORE + _NBYTES + 64)
        crc = zlib.crc32(self._content[_BEFORE : _BEFORE + _NBYTES])
        path = folder / "record"
        stored = bytearray(self._content)
        if damage is not None:
            stored[damage] ^= 1
        path.write_bytes(stored)
        self._content = bytes(stored)
        self._file = FileRef(str(path))
        self.ledger = Ledger([Record(Extent(self._file, _BEFORE, _NBYTES), crc)])

    def read(self, start: int, stop: int) -> None:
        """Note that bytes `start` to `stop` of the record were read."""
        extent = Extent(self._file, _BEFORE + start, stop - start)
        data = self._content[_BEFORE + start : _BEFORE + stop]
        self.ledger.add(extent, memoryview(data))

    def runs(self) -> list[tuple[int, int]]:
        """The runs of the record that the ledger holds."""
        (file,) = self.ledger._files.values()
        return [(run.start - _BEFORE, run.stop - _BEFORE) for run in file.runs(0)]

    def check(self) -> int:
        with Sources() as sources:
            return self.ledger.check(sources).compared


@pytest.mark.parametrize("seed", range(8))
def test_touching_pieces_become_one_run_in_whatever_order_they_are_read(
    tmp_path: Path, seed: int
) -> None:
    order = random.Random(seed)
    cuts = [0, *sorted(order.sample(range(1, _NBYTES), 100)), _NBYTES]
    pieces = list(itertools.pairwise(cuts))
    order.shuffle(pieces)
    file = _File(tmp_path)
    for start, stop in pieces:
        file.read(start, stop)
    assert file.runs() == [(0, _NBYTES)]
    assert file.check() == 1


@pytest.mark.parametrize("seed", range(8))
def test_pieces_that_overlap_and_pieces_never_read_are_checked_all_the_same(
    tmp_path: Path, seed: int
) -> None:
    order = random.Random(seed)
    file = _File(tmp_path)
    file.read(1000, 4000)
    for _ in range(50):
        start = order.randrange(_NBYTES)
        file.read(start, order.randrange(start, _NBYTES) + 1)
        runs = file.runs()
        assert all(stop < start for (_, stop), (start, _) in itertools.pairwise(runs))
    assert file.check() == 1


def test_a_longer_read_takes_the_place_of_those_inside_it(tmp_path: Path) -> None:
    file = _File(tmp_path)
    for start, stop in ((100, 200), (300, 400), (50, 450), (350, 500), (0, 50), (50, 450)):
        file.read(start, stop)
    assert file.runs() == [(0, 450)]


@pytest.mark.parametrize("damage", [0, 10, 2600, _NBYTES - 1])
def test_a_damaged_byte_is_found_whether_it_was_read_or_is_in_a_gap(
    tmp_path: Path, damage: int
) -> None:
    file = _File(tmp_path, damage=_BEFORE + damage)
    for start, stop in ((0, 2000), (3000, 4900)):
        file.read(start, stop)
    with pytest.raises(FormatError, match="CRC-32"):
        file.check()


def test_a_record_of_which_little_was_read_is_not_read_to_its_end(tmp_path: Path) -> None:
    file = _File(tmp_path, damage=_BEFORE + _NBYTES - 1)
    file.read(0, _NBYTES // 4)
    assert file.check() == 0
