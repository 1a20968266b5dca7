"""Where a stream lies, how little of it is read, and what it says of its checksums."""

from __future__ import annotations

import io
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from reshard.containers.torch import Known, TensorRef, read, read_pickle
from reshard.containers.torch.write import lay_out_tensor
from reshard.core.dtypes import FLOAT32
from reshard.core.tensors import FileRef
from reshard.errors import FormatError, IncompleteError
from reshard.storage.local import Sources
from reshard.storage.source import Source
from tests.torchfile.handmade import Member, pickle, tensor, torch_file
from tests.torchfile.support import opened, read_bytes, same, saved


class Counted(Source):
    """A source that counts what is read of it."""

    def __init__(self, inner: Source) -> None:
        super().__init__(inner.ref, inner._fd, inner.identity, inner.size)
        self.reads = 0
        self.nbytes = 0

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.reads += 1
        self.nbytes += len(buffer)
        super().read_into(offset, buffer)


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old"])
@pytest.mark.parametrize("offset", [0, 1, 63, 10025])
def test_streams_packed_into_one_file(tmp_path: Path, offset: int, old: bool) -> None:
    values = [torch.arange(7.0), {"a": torch.ones(2, 3).t()}, torch.tensor(3)]
    streams = [saved(value, old=old) for value in values]
    content = b"\xff" * offset + b"".join(streams)
    with opened(tmp_path / "__0_0.distcp", content) as source:
        for value, stream in zip(values, streams, strict=True):
            file = read(source, offset=offset, nbytes=len(stream))
            assert same(file.value, value, content)
            offset += len(stream)


def test_a_range_past_the_end_of_the_file(tmp_path: Path) -> None:
    content = saved(torch.ones(2))
    with (
        opened(tmp_path / "x.pt", content) as source,
        pytest.raises(IncompleteError, match="are needed, the file has"),
    ):
        read(source, nbytes=len(content) + 1)


def test_many_storages_take_few_reads(tmp_path: Path) -> None:
    content = saved([torch.tensor(i) for i in range(2000)])
    with opened(tmp_path / "x.pt", content) as source:
        counted = Counted(source)
        value: Any = read(counted).value
    assert same(value[1999], torch.tensor(1999), content)
    # Each storage takes a few hundred bytes with its header; a read takes in a dozen.
    assert counted.reads < 2000 / 8


def test_a_large_file_costs_no_more_than_a_small_one(tmp_path: Path) -> None:
    archive = lay_out_tensor(FLOAT32, (1 << 31, 2))
    path = tmp_path / "x.pt"
    with path.open("wb") as file:
        file.write(archive.before)
        # A hole: takes no space.
        file.seek(archive.data_nbytes, 1)
        file.write(archive.after(7))
    with Sources() as sources:
        counted = Counted(sources.open(path))
        read_file = read(counted)
    assert counted.nbytes < 16_384
    value = read_file.value
    assert isinstance(value, TensorRef)
    assert value.extent.nbytes == 1 << 34
    assert [record.crc32 for record in read_file.records] == [7]


def test_checksums_are_those_of_the_storages(tmp_path: Path) -> None:
    base = torch.arange(100.0)
    content = saved({"a": base[3:5], "b": base[7:], "c": torch.ones(3), "e": torch.empty(0)})
    file = read_bytes(tmp_path / "x.pt", content)
    assert len(file.records) == 2
    for record in file.records:
        extent = record.extent
        assert extent.file == FileRef(str(tmp_path / "x.pt"))
        raw = content[extent.offset : extent.offset + extent.nbytes]
        assert zlib.crc32(raw) == record.crc32
    assert [record.extent.nbytes for record in file.records] == [400, 12]
    assert file.warnings == ()


def test_checksums_that_were_not_computed_are_counted(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        content = saved([torch.ones(2), torch.zeros(3), torch.empty(0)])
    finally:
        torch.serialization.set_crc32_options(True)
    file = read_bytes(tmp_path / "x.pt", content)
    assert same(file.value, [torch.ones(2), torch.zeros(3), torch.empty(0)], content)
    assert file.records == ()
    assert file.warnings == ("3 of its records have no checksum.",)


def test_zero_checksums_are_taken_as_not_computed(tmp_path: Path) -> None:
    data = Member("archive/data/0", bytes(range(16)), crc32=0)
    file = read_bytes(tmp_path / "x.pt", torch_file(tensor(), data, crc32=0))
    assert file.records == ()
    assert file.warnings == ("2 of its records have no checksum.",)


def test_the_folder_inside_may_have_any_name(tmp_path: Path) -> None:
    # torch names it after the file.
    torch.save([torch.ones(2)], tmp_path / "step 1.pt")
    content = (tmp_path / "step 1.pt").read_bytes()
    assert zipfile.ZipFile(io.BytesIO(content)).namelist()[0] == "step 1/data.pkl"
    assert same(read_bytes(tmp_path / "x.pt", content).value, [torch.ones(2)], content)


def test_a_file_of_plain_zip_entries(tmp_path: Path) -> None:
    """As torch 1.6 wrote: no byteorder, no padding, no zip64 record, no flags."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr("archive/data.pkl", pickle(tensor()))
        file.writestr("archive/data/0", torch.arange(4.0).numpy().tobytes())
        file.writestr("archive/version", "3\n")
    content = stream.getvalue()
    assert same(read_bytes(tmp_path / "x.pt", content).value, torch.arange(4.0), content)


def test_an_old_file_whose_pickle_is_longer_than_the_first_window(tmp_path: Path) -> None:
    value = {"text": "x" * 3_000_000, "w": torch.ones(2)}
    content = saved(value, old=True)
    assert same(read_bytes(tmp_path / "x.pt", content).value, value, content)


def test_a_dcp_checkpoint(tmp_path: Path) -> None:
    """The metadata's pickle, and each item of the data file as a stream of its own."""
    state = {"w": torch.arange(12.0).reshape(3, 4), "n": torch.tensor(5), "step": 3}
    dcp.save(state, checkpoint_id=tmp_path / "ckpt", no_dist=True)
    raw = (tmp_path / "ckpt" / ".metadata").read_bytes()
    pickled = read_pickle(raw, path=".metadata")
    metadata: Any = pickled.value
    assert metadata.name == "torch.distributed.checkpoint.metadata.Metadata"
    assert metadata.state["state_dict_metadata"]["w"].state["size"] == (3, 4)
    assert "torch.distributed.checkpoint.metadata.MetadataIndex" in pickled.opaque
    found = {}
    with Sources() as sources:
        for index, info in metadata.state["storage_data"].items():
            path = tmp_path / "ckpt" / info.state["relative_path"]
            file = read(
                sources.open(path), offset=info.state["offset"], nbytes=info.state["length"]
            )
            found[index.state["fqn"]] = same(
                file.value, state[index.state["fqn"]], path.read_bytes()
            )
    assert found == {"w": True, "n": True, "step": True}


def shared(tmp_path: Path, *contents: bytes) -> list[Any]:
    """What is read of several files that may repeat each other."""
    values: list[Any] = []
    known = Known()
    with Sources() as sources:
        for number, content in enumerate(contents):
            path = tmp_path / f"{number}.pt"
            path.write_bytes(content)
            values.append(read(sources.open(path), known=known))
    return values


def test_ranks_that_write_the_same_are_parsed_once(tmp_path: Path) -> None:
    """As ZeRO-3's model files, whose parameters are empty: of 256 ranks in 2.6 s, not in 13.8."""
    content = {"module": {f"w{i}": torch.empty(0) for i in range(5)}, "steps": 3}
    torch.save(content, tmp_path / "rank_0.pt")
    torch.save(content, tmp_path / "rank_1.pt")
    first, second, other = shared(
        tmp_path,
        (tmp_path / "rank_0.pt").read_bytes(),
        (tmp_path / "rank_1.pt").read_bytes(),
        saved({**content, "steps": 4}),
    )
    assert first.value is second.value
    assert (first.written_as, second.written_as) == ("rank_0", "rank_1")
    assert other.value["steps"] == 4
    assert other.value["module"].keys() == first.value["module"].keys()


def test_tensors_that_hold_anything_are_each_files_own(tmp_path: Path) -> None:
    content = saved({"a": torch.ones(2), "b": torch.empty(0)})
    first, second = shared(tmp_path, content, content)
    assert first.value["a"].extent.file.path == str(tmp_path / "0.pt")
    assert second.value["a"].extent.file.path == str(tmp_path / "1.pt")
    assert second.records[0].extent.file.path == str(tmp_path / "1.pt")


def test_a_damaged_pickle_is_not_taken_for_one_seen_before(tmp_path: Path) -> None:
    content = saved({"a": torch.empty(0), "steps": 3})
    at = content.index(b"steps")
    with pytest.raises(FormatError, match="CRC-32"):
        shared(tmp_path, content, content[:at] + b"stepz" + content[at + 5 :])
