"""What is missing, damaged, mixed or made to mislead is said plainly, and nothing is written."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

import reshard
from reshard.containers import copies
from reshard.core.tensors import Extent, FileRef, Record
from reshard.errors import (
    FormatError,
    IncompleteError,
    NotFoundError,
    ReshardError,
    UnsupportedError,
    WriteError,
)
from reshard.storage.local import Sources
from tests.fsdp.conftest import Oracle

TENSOR = "model.layers.0.mlp.up_proj.weight"


def edit(folder: Path, change: Callable[[Any], None]) -> None:
    """Change a checkpoint's metadata as torch's own classes have it."""
    metadata: Metadata = dcp.FileSystemReader(folder).read_metadata()
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def copied_again(folder: Path, whole: Path) -> None:
    """What the hint asks for: the folder copied again, or another save, is converted."""
    shutil.rmtree(folder)
    shutil.copytree(whole, folder)
    assert reshard.convert(folder, folder.parent / "again").verified


def refused(
    folder: Path, kind: type[ReshardError], words: str | None, hint: bool = True
) -> ReshardError:
    """Opening the folder raises `kind` with `words`; so does converting, which writes nothing."""
    with pytest.raises(kind, match=words) as caught:
        reshard.open(folder)
    assert caught.value.path is not None
    assert caught.value.hint or not hint
    target = folder.parent / "out"
    with pytest.raises(kind, match=words):
        reshard.convert(folder, target)
    assert not target.exists()
    assert not list(folder.parent.glob(".out*"))
    return caught.value


def test_no_such_folder(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", NotFoundError, "there is no such file or folder", hint=False)


def test_not_a_checkpoint_says_what_is_there(tmp_path: Path) -> None:
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "notes.txt").touch()
    refused(folder, NotFoundError, r"no checkpoint was recognised here; it holds notes\.txt")


@pytest.mark.parametrize("temporary", [".metadata.tmp", None])
def test_unfinished_save(folder: Path, temporary: str | None) -> None:
    (folder / ".metadata").unlink()
    if temporary:
        (folder / temporary).touch()
    words = r"no \.metadata, which is written last.*the save did not finish"
    error = refused(folder, IncompleteError, words)
    assert (".metadata.tmp was begun" in str(error)) == bool(temporary)


def test_unfinished_save_over_an_older_one(folder: Path) -> None:
    (folder / ".metadata.tmp").touch()
    refused(folder, IncompleteError, "a later save into this folder did not finish")


def test_empty_metadata(folder: Path) -> None:
    (folder / ".metadata").write_bytes(b"")
    refused(folder, IncompleteError, "the file is empty")


def test_cut_off_metadata(folder: Path) -> None:
    data = (folder / ".metadata").read_bytes()
    (folder / ".metadata").write_bytes(data[: len(data) // 2])
    refused(folder, IncompleteError, "ends early")


def test_metadata_of_something_else(folder: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps({"a": 1}))
    refused(folder, FormatError, "it has a dict where a Metadata belongs")


def test_metadata_that_would_run_code(folder: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    edit(folder, lambda metadata: metadata.planner_data.update(x=Evil()))
    reshard.open(folder)
    (folder / ".metadata").write_bytes(pickle.dumps(Evil()))
    refused(folder, FormatError, "where a Metadata belongs")
    assert not (tmp_path / "ran").exists()


def test_missing_file(folder: Path) -> None:
    (folder / "__1_0.distcp").unlink()
    error = refused(folder, IncompleteError, "metadata lists this file, but it is missing")
    assert str(error.path).endswith("__1_0.distcp")


@pytest.mark.parametrize("kept", [0, 1, 700, 0.5, 0.999])
def test_short_file(folder: Path, kept: float) -> None:
    file = folder / "__1_0.distcp"
    size = file.stat().st_size
    os.truncate(file, int(size * kept) if isinstance(kept, float) else kept)
    error = refused(folder, IncompleteError, None)
    assert error.tensor
    assert str(error.path) == str(file)


def test_flipped_bits_are_found_while_converting(folder: Path) -> None:
    entry = reshard.open(folder).tensors[TENSOR].entry
    extent = entry.fragments[0].in_file
    data = bytearray(Path(extent.file.path).read_bytes())
    data[extent.offset] ^= 1
    Path(extent.file.path).write_bytes(data)
    with pytest.raises(FormatError, match="CRC"):
        reshard.convert(folder, folder.parent / "out")
    assert not (folder.parent / "out").exists()


def test_unknown_transform(oracle: Oracle, tmp_path: Path) -> None:
    folder = oracle.copy("zstd", tmp_path)

    def change(metadata: Metadata) -> None:
        for info in metadata.storage_data.values():
            info.transform_descriptors = ["stream.secret@corp/2"]

    edit(folder, change)
    refused(folder, UnsupportedError, "saved with the transforms stream.secret@corp/2")
    copied_again(folder, oracle["fsdp2-w2"].checkpoint)


def test_damaged_zstd_frame(oracle: Oracle, tmp_path: Path) -> None:
    folder = oracle.copy("zstd", tmp_path)
    data = bytearray((folder / "__1_0.distcp").read_bytes())
    data[2000:2600] = bytes(600)
    (folder / "__1_0.distcp").write_bytes(data)
    refused(folder, FormatError, "zstd", hint=False)
    copied_again(folder, oracle["zstd"].checkpoint)


def test_zstd_frame_that_swells(oracle: Oracle, tmp_path: Path) -> None:
    folder = oracle.copy("zstd", tmp_path)
    frame = zstandard.compress(bytes(1 << 30))
    assert len(frame) < 1 << 17
    (folder / "__9_0.distcp").write_bytes(frame)

    def change(metadata: Metadata) -> None:
        info = metadata.storage_data[MetadataIndex(TENSOR, [0, 0])]
        info.relative_path, info.offset, info.length = "__9_0.distcp", 0, len(frame)

    edit(folder, change)
    refused(folder, FormatError, "its frame holds more than 66064 bytes")
    copied_again(folder, oracle["zstd"].checkpoint)


def test_without_zstandard(oracle: Oracle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    folder = oracle.copy("zstd", tmp_path)
    error = refused(folder, UnsupportedError, "compressed with zstd")
    assert ".[zstd]" in str(error.hint)
    monkeypatch.undo()  # the extra is installed again
    copied_again(folder, oracle["zstd"].checkpoint)


def test_writers_without_collectives(oracle: Oracle, tmp_path: Path) -> None:
    folder = oracle.copy("no-collectives", tmp_path)
    (folder / "__0.metadata").unlink()
    refused(folder, IncompleteError, r"up to rank 1, but __0\.metadata is missing")
    copied_again(folder, oracle["no-collectives"].checkpoint)


def test_a_writer_of_an_endless_rank(oracle: Oracle, tmp_path: Path) -> None:
    folder = oracle.copy("no-collectives", tmp_path)
    (folder / "__1.metadata").rename(folder / "__999999999999.metadata")
    refused(folder, IncompleteError, r"up to rank 999999999999, but __1\.metadata is missing")


def test_metadata_that_is_a_link_out_of_the_folder(folder: Path) -> None:
    (folder / ".metadata").rename(folder.parent / "metadata")
    (folder / ".metadata").symlink_to("../metadata")
    refused(folder, FormatError, "a link that leaves the folder")


def test_last_writer_without_collectives_is_missed(oracle: Oracle, tmp_path: Path) -> None:
    folder = oracle.copy("no-collectives", tmp_path)
    (folder / "__1.metadata").unlink()
    refused(folder, IncompleteError, "elements are in the checkpoint")


def test_writers_of_different_saves(oracle: Oracle, tmp_path: Path) -> None:
    folder = oracle.copy("no-collectives", tmp_path)
    metadata: Metadata = dcp.FileSystemReader(folder).read_metadata(rank=1)
    metadata.state_dict_metadata["long"].size = torch.Size([264, 3])
    (folder / "__1.metadata").write_bytes(pickle.dumps(metadata))
    refused(folder, FormatError, r"the ranks disagree.*\(263, 3\).*\(264, 3\)")
    copied_again(folder, oracle["no-collectives"].checkpoint)


def test_replicas_that_differ(oracle: Oracle, tmp_path: Path) -> None:
    folder = oracle.copy("no-collectives", tmp_path)
    reader = dcp.FileSystemReader(folder)
    info = reader.read_metadata(rank=1).storage_data[MetadataIndex("positions", [0])]
    stream = io.BytesIO()
    torch.save(torch.arange(11) + 1, stream)
    assert len(stream.getvalue()) == info.length
    data = bytearray((folder / info.relative_path).read_bytes())
    data[info.offset : info.offset + info.length] = stream.getvalue()
    (folder / info.relative_path).write_bytes(data)
    words = "2 ranks saved separate copies of it, and the copies differ"
    assert refused(folder, FormatError, words).tensor == "positions"
    spoilt = shutil.copytree(folder, tmp_path / "spoilt")
    copied_again(folder, oracle["fsdp2-w2"].checkpoint)  # whose ranks agreed on who saves what
    shutil.copytree(spoilt, tmp_path / "apart")
    for path in (tmp_path / "apart").glob("__1*"):
        path.unlink()
    with pytest.raises(IncompleteError):  # of shards, the other ranks' files are missed
        reshard.open(tmp_path / "apart")


def test_two_saves_in_one_folder(oracle: Oracle, tmp_path: Path) -> None:
    folder = oracle.copy("no-collectives", tmp_path)
    shutil.copy(folder / "__0.metadata", folder / ".metadata")
    refused(folder, FormatError, r"both \.metadata and __0\.metadata")


@pytest.mark.parametrize("number", ["00001", "00002"])
def test_missing_shard_of_the_hugging_face_writer(
    oracle: Oracle, tmp_path: Path, number: str
) -> None:
    folder = oracle.copy("hf-sharded", tmp_path)
    name = f"shard-{number}-model-00002-of-00002.safetensors"
    (folder / name).unlink()
    refused(folder, IncompleteError, f"{name} is missing")


def test_shards_of_different_saves(oracle: Oracle, tmp_path: Path) -> None:
    folder = oracle.copy("hf-sharded", tmp_path)
    old = folder / "shard-00002-model-00002-of-00002.safetensors"
    old.rename(folder / "shard-00002-model-00002-of-00003.safetensors")
    refused(folder, FormatError, "the model has 2 and 3 files")
    (folder / "shard-00002-model-00002-of-00003.safetensors").rename(old)
    assert reshard.convert(folder, tmp_path / "again").verified


def test_short_shard(oracle: Oracle, tmp_path: Path) -> None:
    folder = oracle.copy("hf-sharded", tmp_path)
    file = folder / "shard-00002-model-00001-of-00002.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    refused(folder, IncompleteError, "its header describes")


def test_output_that_exists(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(WriteError, match="exists"):
        reshard.convert(folder, tmp_path / "out")
    assert (tmp_path / "out" / "mine").exists()


def test_nothing_to_convert(tmp_path: Path) -> None:
    folder = tmp_path / "none"
    dcp.save({"step": 5}, checkpoint_id=folder, no_dist=True)
    refused(folder, NotFoundError, "it holds no tensor; its objects are step")


@pytest.mark.parametrize("name", ["fsdp1-w4", "fsdp2-w3", "fsdp1-st-w3"])
def test_one_ranks_file_over_anothers(oracle: Oracle, tmp_path: Path, name: str) -> None:
    folder = oracle.copy(name, tmp_path)
    shutil.copy(folder / "__0_0.distcp", folder / "__1_0.distcp")
    refused(folder, IncompleteError, "one rank's file was copied over another's")
    copied_again(folder, oracle[name].checkpoint)


@pytest.mark.parametrize("values", [bytes(256), b"\x00\x00\x80\x3f" * 64, bytes(range(256))])
def test_ranks_may_well_hold_the_same_constants(tmp_path: Path, values: bytes) -> None:
    records = []
    for rank in range(2):
        path = tmp_path / f"__{rank}_0.distcp"
        path.write_bytes(values)
        records.append(Record(Extent(FileRef(str(path)), 0, 256), zlib.crc32(values)))
    with Sources() as sources:
        copies.check({"one": records[:1], "other": records[1:]}, sources)  # tied weights
        if len(set(values)) < 5:
            copies.check({"norm": records}, sources)
        else:
            with pytest.raises(IncompleteError, match="copied over another's"):
                copies.check({"norm": records}, sources)


def doubling() -> object:
    """Lists of two of the list before: a small file, and a text of 2^10 brackets; a few more, and
    the pickle reader refuses them."""
    value: list[object] = []
    for _ in range(10):
        value = [value, value]
    return value


def test_values_whose_text_is_long(folder: Path) -> None:
    (folder / "good").write_bytes((folder / ".metadata").read_bytes())

    def shape(metadata: Metadata) -> None:
        index = next(iter(metadata.storage_data))
        metadata.storage_data[index].offset = doubling()

    def transforms(metadata: Metadata) -> None:
        for info in metadata.storage_data.values():
            info.transform_descriptors = [doubling()]

    def path(metadata: Metadata) -> None:
        metadata.planner_data[TENSOR] = (doubling(),)

    for change, words in (
        (shape, r"a place has \[\["),
        (transforms, "not a list of texts"),
        (path, "not of names and numbers"),
    ):
        (folder / ".metadata").write_bytes((folder / "good").read_bytes())
        edit(folder, change)
        refused(folder, FormatError, words)
