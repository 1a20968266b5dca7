"""Runs of records that are spelt alike are read as opcode by opcode."""

from __future__ import annotations

import pickle
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from benchmarks.giants import Size, make_megatron
from reshard.containers.dcp.metadata import Metadata
from reshard.containers.dcp.parsing import compared, unpickled
from reshard.containers.dcp.tables import Tables
from reshard.containers.torch import read_tables
from reshard.containers.torch.machine import Machine
from reshard.errors import ReshardError, UnsupportedError
from tests.torchfile.runs import both

SHAPES: tuple[tuple[int, ...], ...] = ((), (6,), (6, 70_000), (4, 3, 300), (2, 2, 2, 2), (2,) * 5)


def save(*, shared: bool, transforms: tuple[str, ...] = (), count: int = 40) -> dcp.Metadata:
    """Tensors of every number of dimensions; `shared`: strings are pickled once for all tables."""
    described: dict[str, Any] = {"step": dcp.BytesStorageMetadata()}
    stored: dict[Any, Any] = {dcp.MetadataIndex("step"): _StorageInfo("__0_0.distcp", 0, 9)}
    for number in range(count):
        shape = SHAPES[number % len(SHAPES)]
        name = f"layers.{number}.größe{'.' * number * 8}" if number % 9 == 8 else f"l.{number}.w"
        rows = shape[0] // 2 if shape else 0
        cuts = [(0, rows), (rows, rows)] if shape else [(0, 0)]
        chunks = []
        for part, (start, size) in enumerate(cuts):
            offsets = (start, *(0 for _ in shape[1:])) if shape else ()
            sizes = (size, *shape[1:]) if shape else ()
            chunks.append(dcp.ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
            own = name if shared else name.encode().decode()
            file = f"__{part}_0.distcp" if not shared else "__0_0.distcp"
            place = _StorageInfo(file, (number * 2 + part) << (number % 40), 1000 + number)
            if transforms:
                place = _StorageInfo(file, place.offset, place.length, list(transforms))
            stored[dcp.MetadataIndex(own, offsets, part)] = place
        properties = dcp.TensorProperties(torch.bfloat16)
        described[name] = dcp.TensorStorageMetadata(properties, torch.Size(shape), chunks)
    paths = {name: (name,) for name in described}
    return dcp.Metadata(described, paths, stored, dcp.StorageMeta("x"), "1.0.0")


def noted(data: bytes) -> int:
    """How many keys were taken out of the tables while the pickle was read."""
    tables = Tables("p", len(data))
    found = read_tables(data, tables, path="p")
    assert found is not None
    assert len(compared(found.value, tables).paths) == len(tables.order)
    return len(tables.order)


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("transforms", [(), ("stream.zstd/1",)])
def test_what_torch_pickles(protocol: int, shared: bool, transforms: tuple[str, ...]) -> None:
    data = pickle.dumps(save(shared=shared, transforms=transforms), protocol)
    fast, slow = both(data)
    assert isinstance(fast, Metadata)
    assert fast == slow
    assert noted(data) == 41


@pytest.mark.heavy
def test_mutants_are_read_alike() -> None:
    """Wherever a byte differs, both ways read the same or refuse."""
    rng = random.Random(3)
    whole = pickle.dumps(save(shared=False, count=12))
    for _ in range(1500):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(data))
            match rng.randrange(3):
                case 0:
                    data[at] = rng.randrange(256)
                case 1:
                    del data[at]
                case 2:
                    data[at:at] = rng.choice([b"h\x05", b"\x94", b"0", b"K\x01", b"ub", b")"])
        fast, slow = both(bytes(data))
        if isinstance(fast, Metadata) or isinstance(slow, Metadata):
            assert fast == slow


def test_plans_that_recall_the_records(tmp_path: Path) -> None:
    """Megatron's plans, where they are not cut off, refer to chunks and indices of the tables."""
    make_megatron(tmp_path / "m", Size(layers=1, experts=8, world=8))
    fast, slow = both((tmp_path / "m" / ".metadata").read_bytes())
    assert isinstance(fast, Metadata)
    assert fast == slow


def test_a_value_that_was_left_out_is_read_opcode_by_opcode(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The tuple inside of a torch.Size is not kept; a pickle may recall it all the same."""
    data = pickle.dumps(save(shared=True))
    runs: list[bool] = []  # whether what was not needed was left out
    first = Machine.__init__

    def noting(self: Machine, *given: Any, **named: Any) -> None:
        runs.append(named.get("compactor") is not None)
        first(self, *given, **named)

    monkeypatch.setattr(Machine, "__init__", noting)
    count = data.count(b"\x94")
    recalling = data[:-1]
    # `(h N h N u` would set fields; a value is recalled and dropped into a tuple of the result.
    for index in range(count - 1, 0, -1):
        recall = recalling + b"j" + index.to_bytes(4, "little") + b"\x86."
        runs.clear()
        with suppress(ReshardError):
            unpickled(recall, Path("p"))
        if runs == [True, False]:
            break
    assert runs == [True, False]


def test_a_list_of_chunks_that_many_tensors_recall_is_refused() -> None:
    """In each it counts, although its records are dropped: 900 tensors of 60,000 chunks each."""
    metadata = save(shared=True, count=1)
    (one,) = (t for t in metadata.state_dict_metadata.values() if hasattr(t, "chunks"))
    chunks = [dcp.ChunkStorageMetadata(torch.Size([n]), torch.Size([1])) for n in range(60_000)]
    for number in range(900):
        shared = dcp.TensorStorageMetadata(one.properties, torch.Size([60_000]), chunks)
        metadata.state_dict_metadata[f"w{number}"] = shared
    for protocol in (2, 4):
        data = pickle.dumps(metadata, protocol)
        with pytest.raises(UnsupportedError, match="repeats its parts over and over"):
            unpickled(data, Path("p"))


@pytest.mark.parametrize("protocol", [2, 4])
def test_records_that_tensors_share(protocol: int) -> None:
    """Properties, sizes and lists of chunks that are pickled once, and recalled by all tensors."""
    metadata = save(shared=True, count=1200)
    tensors = [t for t in metadata.state_dict_metadata.values() if hasattr(t, "chunks")]
    fast, slow = both(pickle.dumps(metadata, protocol))
    assert fast == slow
    for tensor in tensors:
        tensor.properties = tensors[0].properties
    data = pickle.dumps(metadata, protocol)
    fast, slow = both(data)
    assert isinstance(fast, Metadata)
    assert fast == slow
    assert noted(data) == 1201
    for tensor in tensors[len(SHAPES) :]:
        tensor.size, tensor.chunks = tensors[0].size, tensors[0].chunks
    fast, slow = both(pickle.dumps(metadata, protocol))
    assert isinstance(fast, Metadata)
    assert fast == slow


def test_a_record_that_is_recalled_before_it_is_built() -> None:
    """The metadata's own record, named again inside one of its tables, is not an empty one."""
    metadata = save(shared=True)
    for place in list(metadata.storage_data.values())[:1]:
        place.transform_descriptors = [metadata]
    fast, slow = both(pickle.dumps(metadata, 4))
    assert fast == slow
    assert str(fast).startswith("FormatError ")
