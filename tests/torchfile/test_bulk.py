"""Records that are matched many at a time, and values that repeat, are read as opcode by opcode."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from benchmarks.giants import Size, make_megatron
from reshard.containers.dcp.metadata import Metadata
from reshard.containers.dcp.tables import Tables
from reshard.containers.torch import bulk, read_tables
from reshard.containers.torch.memo import RecalledError
from reshard.containers.torch.rows import Ledger, Rows, aligned
from reshard.containers.torch.spans import Spans
from tests.torchfile.runs import as_large, in_batches, same, save


class Seen:
    """How many records came in bulk, and how many values of a span that was known."""

    def __init__(self) -> None:
        self.records = 0
        self.spans = 0


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Seen]:
    """What is counted while small pickles are read as large ones are."""
    found = Seen()
    match, read = bulk.match, Spans.read

    def counted(*given: Any) -> bulk.Matched | None:
        matched = match(*given)
        found.records += 0 if matched is None else matched.count
        return matched

    def noted(self: Spans, m: Any, cls: Any, pos: int) -> int:
        end = read(self, m, cls, pos)
        found.spans += end != pos
        return end

    monkeypatch.setattr(bulk, "match", counted)
    monkeypatch.setattr(Spans, "read", noted)
    with as_large():
        yield found


@pytest.mark.parametrize("dims", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("own_names", [True, False])
def test_what_torch_pickles(seen: Seen, dims: int, own_names: bool) -> None:
    data = pickle.dumps(save(60 if dims else 1, 3 if dims else 60, dims=dims, own_names=own_names))
    assert isinstance(same(data), Metadata)
    assert seen.records > 150 if dims else 50


def test_frames_and_batches_cut_runs_apart(seen: Seen) -> None:
    data = pickle.dumps(save(1200, 2))
    assert data.count(b"\x95") > 3
    assert isinstance(same(data), Metadata)
    assert seen.records > 4000


def test_without_frames(seen: Seen) -> None:
    """As picklers of other languages write, and Python's own where frames are switched off."""
    pickled = pickle.dumps(save(400, 2))
    data, at = pickled[:2], 2
    while at < len(pickled) and pickled[at] == 0x95:
        nbytes = int.from_bytes(pickled[at + 1 : at + 9], "little")
        data += pickled[at + 9 : at + 9 + nbytes]
        at += 9 + nbytes
    assert at == len(pickled)
    assert isinstance(same(data), Metadata)
    assert seen.records > 1500


def mutated(seen: Seen, parts: int, tensors: int, values: int) -> None:
    """Whatever a byte of the records becomes, both ways read the same."""
    whole = pickle.dumps(save(parts, tensors))
    assert isinstance(same(whole), Metadata)
    rng = random.Random(5)
    read = 0
    for at in range(150, len(whole)):
        chosen = [rng.choice(b"hjKMJ\x8a\x8c\x94\x95\x85ub)"), *rng.sample(range(256), values - 1)]
        for value in chosen:
            data = bytearray(whole)
            data[at] = value
            read += isinstance(same(bytes(data)), Metadata)
    assert read > 50  # numbers that may be others
    assert seen.records > len(whole) * values


def test_every_byte_of_a_run(seen: Seen) -> None:
    mutated(seen, 5, 1, 1)


@pytest.mark.slow
def test_every_byte_of_long_runs(seen: Seen) -> None:
    mutated(seen, 12, 2, 8)


def test_bytes_that_are_missing_or_too_many(seen: Seen) -> None:
    whole = in_batches(save(3, 8))
    rng = random.Random(6)
    for _ in range(500):
        data = bytearray(whole)
        at = rng.randrange(150, len(data))
        match rng.randrange(4):
            case 0:
                del data[at]
            case 1:
                data[at:at] = rng.choice([b"h\x05", b"\x94", b"0", b"K\x01", b"ub", b")", b"\x86"])
            case 2:
                del data[at : at + rng.randrange(200)]
            case 3:
                data[at] = rng.randrange(256)
        same(bytes(data))
    assert seen.records > 500
    assert seen.spans > 300


@pytest.mark.parametrize(
    "spoil",
    ["same place", "two sizes", "no elements", "no chunk", "place twice", "no place", "overlap"],
)
def test_what_contradicts_itself_is_refused_alike(seen: Seen, spoil: str) -> None:
    metadata = save(40, 2)
    (tensor, _) = metadata.state_dict_metadata.values()
    assert isinstance(tensor, dcp.TensorStorageMetadata)
    chunk = tensor.chunks[20]
    match spoil:
        case "same place":
            tensor.chunks[21] = chunk
        case "two sizes":
            tensor.chunks[21] = dcp.ChunkStorageMetadata(chunk.offsets, torch.Size((7, 300)))
        case "no elements":
            tensor.chunks[21] = dcp.ChunkStorageMetadata(chunk.offsets, torch.Size((0, 300)))
        case "no chunk":
            tensor.chunks[21] = None
        case "place twice":
            index = dcp.MetadataIndex("0.w", chunk.offsets, 99)
            metadata.storage_data[index] = _StorageInfo("x", 0, 7)
        case "no place":
            metadata.storage_data.popitem()
        case "overlap":
            tensor.chunks[21] = dcp.ChunkStorageMetadata(torch.Size((1, 0)), torch.Size((9, 9)))
    same(pickle.dumps(metadata))
    assert seen.records > 10


def test_plans_that_recall_the_records(seen: Seen, tmp_path: Path) -> None:
    """Megatron's plans, where they are not cut off, refer to chunks and indices of the tables."""
    make_megatron(tmp_path / "m", Size(layers=1, experts=2, world=4))
    assert isinstance(same((tmp_path / "m" / ".metadata").read_bytes()), Metadata)
    assert seen.records


def test_values_that_repeat_are_read_once(seen: Seen) -> None:
    data = in_batches(save(3, 50))
    assert isinstance(same(data), Metadata)
    assert seen.spans == 50 - 5
    tables = Tables("p", len(data))
    assert read_tables(data, tables, path="p") is not None
    assert len({id(layout) for layout in tables.said}) == 1


def test_what_is_recalled_of_values_that_repeat(seen: Seen) -> None:
    """Any value may be recalled at the end, as one more field of the metadata: what was not kept is
    read opcode by opcode."""
    whole = in_batches(save(2, 6), 2)
    for index in range(whole.count(b"\x94")):
        data = whole[:-3] + b"\x8c\x01x\x94j" + index.to_bytes(4, "little") + whole[-3:]
        same(data)
    assert seen.spans > 100


def test_a_repeated_value_that_is_changed_afterwards(seen: Seen) -> None:
    """State that is set in a record behind its own bytes is that record's alone."""
    whole = in_batches(save(3, 12))
    tail = b"}\x94(\x8c\x06chunks\x94]\x94ub"
    ends = [at for at in range(len(whole)) if whole.startswith(b"ubeub\x8c", at)]
    assert len(ends) > 3
    for end in ends:
        at = end + len(b"ubeub")
        data = whole[:at] + tail + whole[at:]
        nbytes = int.from_bytes(whole[3:11], "little") + len(tail)
        same(data[:3] + nbytes.to_bytes(8, "little") + data[11:])
    assert seen.spans > 10


def test_rows_that_nobody_takes(seen: Seen) -> None:
    """Runs that stand elsewhere than in the tables: in tuples, in lists of other fields."""
    chunks = [dcp.ChunkStorageMetadata(torch.Size([n]), torch.Size([1])) for n in range(50)]
    metadata = save(30)
    for value in (tuple(chunks), chunks, {"x": chunks}, [chunks] * 3):
        metadata.planner_data = value
        assert same(pickle.dumps(metadata)) is not None
        metadata.planner_data = {"0.w": ("0.w",)}
        metadata.extra = value
        assert isinstance(same(pickle.dumps(metadata)), Metadata)
    tensor = metadata.state_dict_metadata["0.w"]
    assert isinstance(tensor, dcp.TensorStorageMetadata)
    for field in ("size", "properties", "chunks"):
        held = getattr(tensor, field)
        setattr(tensor, field, (*chunks,))
        assert isinstance(same(pickle.dumps(metadata)), str)
        setattr(tensor, field, held)
    metadata.extra = tensor.chunks
    assert isinstance(same(pickle.dumps(metadata)), Metadata)


def test_records_are_aligned() -> None:
    ledger = Ledger()

    def rows(count: int) -> Rows:
        return Rows("c", ("t",), ([*"abcdefgh"[:count]],), count, ledger, alternate=True)

    long, short = rows(5), rows(3)
    found = [*aligned([1, long], [short, 2, 3, 4])]
    assert [[stop - start for _, start, stop in pair] for pair in found] == [[1, 1], [2, 2]] + [
        [1, 1]
    ] * 3
    assert found[1] == ((long, 0, 2), (short, 1, 3))
    for unequal in ([1], [1, long, 2]):
        with pytest.raises(RecalledError):
            [*aligned(unequal, [short, 2, 3, 4])]
    assert ledger.open == 2
    long.take()
    long.take()
    assert ledger.open == 1
