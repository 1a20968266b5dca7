"""DCP metadata that contradicts itself or its files is refused."""

from __future__ import annotations

import io
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

import reshard
from reshard.errors import (
    FormatError,
    IncompleteError,
    NotFoundError,
    ReshardError,
    UnsupportedError,
)
from reshard.formats.dcp import parts
from tests.fsdp.conftest import Oracle
from tests.fsdp.test_refusals import TENSOR, copied_again, edit, refused


def test_a_pickle_of_something_else_is_not_read_to_its_end(folder: Path) -> None:
    long = b"](" + b"N" * 999 + b"e"
    (folder / ".metadata").write_bytes(b"\x80\4" + b"](" + long * 100 + b"\xff")
    refused(folder, FormatError, "it has a list where a Metadata belongs", hint=True)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("../other/__0_0.distcp", "not a plain file name"),
        ("/etc/hostname", "not a plain file name"),
        ("..", "not a plain file name"),
        ("", "not a plain file name"),
        ("a\0b", "not a plain file name"),
        ("a" * 300, "not a plain file name"),
        ("link.distcp", "a link that leaves the folder"),
        ("pipe.distcp", "not a regular file"),
    ],
)
def test_metadata_that_points_elsewhere(folder: Path, name: str, words: str) -> None:
    (folder / "link.distcp").symlink_to("/etc/hostname")
    os.mkfifo(folder / "pipe.distcp")
    other = folder.parent / "other"
    other.mkdir()
    shutil.copy(folder / "__0_0.distcp", other)

    def change(metadata: Metadata) -> None:
        for info in metadata.storage_data.values():
            info.relative_path = name

    edit(folder, change)
    refused(folder, FormatError, words, hint=name != "pipe.distcp")


@pytest.mark.parametrize(
    ("offset", "length", "kind"),
    [
        (1 << 40, 100, IncompleteError),
        (0, 1 << 40, IncompleteError),
        (-1, 100, FormatError),
        (1 << 70, 100, FormatError),
        (64, 2000, ReshardError),
        (0, 10, ReshardError),
    ],
)
def test_metadata_that_points_outside_a_file(
    folder: Path, offset: int, length: int, kind: type[ReshardError]
) -> None:
    def change(metadata: Metadata) -> None:
        metadata.storage_data[MetadataIndex(TENSOR, [0, 0])].offset = offset
        metadata.storage_data[MetadataIndex(TENSOR, [0, 0])].length = length

    edit(folder, change)
    error = refused(folder, kind, None, hint=False)
    assert error.tensor == TENSOR


def test_items_exchanged(folder: Path) -> None:
    def change(metadata: Metadata) -> None:
        other = MetadataIndex("model.norm.weight", [0])
        metadata.storage_data[MetadataIndex(TENSOR, [0, 0])] = metadata.storage_data[other]

    edit(folder, change)
    words = r"its item is float32 \[6\]; the metadata says float32 \[11, 12\]"
    assert refused(folder, FormatError, words).tensor == TENSOR


def test_another_dtype(folder: Path) -> None:
    def change(metadata: Metadata) -> None:
        metadata.state_dict_metadata[TENSOR].properties.dtype = torch.int32

    edit(folder, change)
    words = r"its item is float32 \[11, 12\]; the metadata says int32"
    assert refused(folder, FormatError, words).tensor == TENSOR


def test_unknown_dtype(folder: Path) -> None:
    def change(metadata: Metadata) -> None:
        metadata.state_dict_metadata[TENSOR].properties.dtype = torch.complex128

    edit(folder, change)
    words = "dtype 'torch.complex128' is not supported"
    assert refused(folder, UnsupportedError, words, hint=False).tensor == TENSOR


def test_item_that_is_no_tensor(folder: Path, oracle: Oracle) -> None:
    stream = io.BytesIO()
    torch.save({"a": 1}, stream)
    (folder / "__9_0.distcp").write_bytes(stream.getvalue())

    def change(metadata: Metadata) -> None:
        info = metadata.storage_data[MetadataIndex(TENSOR, [0, 0])]
        info.relative_path, info.offset = "__9_0.distcp", 0
        info.length = len(stream.getvalue())

    edit(folder, change)
    refused(folder, FormatError, "its item holds no plain tensor")
    copied_again(folder, oracle["fsdp2-w2"].checkpoint)


def _chunks(metadata: Metadata) -> list[Any]:
    chunks: list[Any] = metadata.state_dict_metadata[TENSOR].chunks
    return chunks


def test_hole(folder: Path, oracle: Oracle) -> None:
    edit(folder, lambda metadata: _chunks(metadata).pop())
    words = "132 of its 264 elements are in the checkpoint"
    assert refused(folder, IncompleteError, words).tensor == TENSOR
    copied_again(folder, oracle["fsdp2-w2"].checkpoint)


def test_a_path_of_endless_steps(folder: Path) -> None:
    def change(metadata: Metadata) -> None:
        assert metadata.planner_data is not None
        metadata.planner_data[TENSOR] = ("model",) * 100_000

    edit(folder, change)
    refused(folder, FormatError, "its path in the state dict has 100000 steps")


def test_paths_as_deep_as_they_may_be() -> None:
    paths = {f"{number}": ("model",) * 127 + (f"w{number}",) for number in range(1000)}
    assert parts.find(paths, None, "x").path == ("model",) * 127
    assert parts.find(paths, "model.model", "x").path == ("model",) * 2
    with pytest.raises(NotFoundError, match="no tensor lies under"):
        parts.find(paths, "model.mode", "x")


@pytest.mark.parametrize(
    "paths", [[("model",), ("model", "w")], [("a",), ("model", "model", "w"), ("model", "model")]]
)
def test_a_tensor_and_a_dict_at_one_place(paths: list[tuple[str, ...]]) -> None:
    with pytest.raises(FormatError, match="both a tensor and a dict of tensors"):
        parts.find({str(number): path for number, path in enumerate(paths)}, None, "x")


def test_chunk_without_a_place(folder: Path, oracle: Oracle) -> None:
    edit(folder, lambda metadata: metadata.storage_data.pop(MetadataIndex(TENSOR, [11, 0])))
    words = r"does not say where its chunk at \(11, 0\) lies"
    assert refused(folder, IncompleteError, words).tensor == TENSOR
    copied_again(folder, oracle["fsdp2-w2"].checkpoint)


def test_overlap(folder: Path) -> None:
    def change(metadata: Metadata) -> None:
        chunk = _chunks(metadata)[1]
        old = metadata.storage_data.pop(MetadataIndex(TENSOR, [11, 0]))
        chunk.offsets = torch.Size([10, 0])
        metadata.storage_data[MetadataIndex(TENSOR, [10, 0])] = old

    edit(folder, change)
    words = r"two parts hold the same elements: \[0:11, 0:12\] and \[10:21, 0:12\]"
    assert refused(folder, FormatError, words, hint=False).tensor == TENSOR


def test_chunk_outside_the_tensor(folder: Path) -> None:
    def change(metadata: Metadata) -> None:
        metadata.state_dict_metadata[TENSOR].size = torch.Size([21, 12])

    edit(folder, change)
    assert refused(folder, FormatError, "does not lie inside", hint=False).tensor == TENSOR


def test_chunk_of_another_rank(folder: Path) -> None:
    def change(metadata: Metadata) -> None:
        metadata.state_dict_metadata[TENSOR].size = torch.Size([264])

    edit(folder, change)
    assert refused(folder, FormatError, "is not of shape", hint=False).tensor == TENSOR


def _storage(metadata: Metadata) -> dict[MetadataIndex, Any]:
    places: dict[MetadataIndex, Any] = metadata.storage_data
    return places


def _lose(metadata: Metadata) -> None:
    del metadata.state_dict_metadata[TENSOR]


def _lose_everywhere(metadata: Metadata) -> None:
    _lose(metadata)
    del metadata.planner_data[TENSOR]


def _make_an_object(metadata: Metadata) -> None:
    metadata.state_dict_metadata[TENSOR] = BytesStorageMetadata()


def _rename(metadata: Metadata) -> None:
    tensors = metadata.state_dict_metadata
    tensors["renamed"] = tensors.pop(TENSOR)


def _rename_path(metadata: Metadata) -> None:
    metadata.planner_data[TENSOR] = ("renamed",)


def _lose_path(metadata: Metadata) -> None:
    del metadata.planner_data[TENSOR]


def _lose_paths(metadata: Metadata) -> None:
    vars(metadata).pop("planner_data")


def _rename_place(metadata: Metadata) -> None:
    _storage(metadata)[MetadataIndex("renamed", [0, 0])] = _storage(metadata)[
        MetadataIndex(TENSOR, [0, 0])
    ]


def _share(metadata: Metadata) -> None:
    """The bytes of one layer's tensor are another's."""
    other = MetadataIndex(TENSOR.replace("layers.0", "layers.1"), [0, 0])
    _storage(metadata)[MetadataIndex(TENSOR, [0, 0])] = _storage(metadata)[other]


def _share_twice(metadata: Metadata) -> None:
    """The two are one, in all their chunks, and nothing says that they may be."""
    for start in (0, 11):
        other = MetadataIndex(TENSOR.replace("layers.0", "layers.1"), [start, 0])
        _storage(metadata)[MetadataIndex(TENSOR, [start, 0])] = _storage(metadata)[other]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_lose, "its planner_data has it, its state dict does not"),
        (
            _lose_everywhere,
            r"has a location for it at \(\d+, 0\), but the state dict has no such chunk",
        ),
        (
            _make_an_object,
            r"has a location for it at \(\d+, 0\), but the state dict has no such chunk",
        ),
        (_rename, "its state dict has it, its planner_data does not|planner_data has it"),
        (_rename_path, r"its path in the state dict is \('renamed',\)"),
        (_lose_path, "its state dict has it, its planner_data does not"),
        (_lose_paths, "it has no planner_data"),
        (_rename_place, "has a location for it at .*, but the state dict has no such chunk"),
        (_share, "also belong to"),
        (_share_twice, "also belong to"),
    ],
)
def test_tables_of_the_metadata_that_contradict_each_other(
    folder: Path, oracle: Oracle, change: Callable[[Metadata], None], words: str
) -> None:
    edit(folder, change)
    refused(folder, FormatError, words, hint=True)
    copied_again(folder, oracle["fsdp2-w2"].checkpoint)


def test_a_key_that_is_set_twice(folder: Path) -> None:
    """By pickletools: the opcode that fetches one key's text is made to fetch another's."""
    data = (folder / ".metadata").read_bytes()
    last = b"model.layers.1.mlp.up_proj.weight"
    assert data.count(last)
    assert len(last) == len(TENSOR)
    (folder / ".metadata").write_bytes(data.replace(last, TENSOR.encode()))
    refused(folder, FormatError, f"it sets the key {TENSOR!r} twice", hint=False)


@pytest.mark.parametrize("name", ["fsdp2-w2", "accelerate", "titan", "extras", "safetensors"])
def test_flipped_bits_lose_and_rename_nothing(oracle: Oracle, tmp_path: Path, name: str) -> None:
    """400 bits of each metadata; a name that torch pickled once for all tables has no witness."""
    folder = oracle.copy(name, tmp_path)
    good = reshard.open(folder).catalog
    data = (folder / ".metadata").read_bytes()
    generator = random.Random(name)
    unchanged = 0
    for _ in range(400):
        bit = generator.randrange(len(data) * 8)
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        (folder / ".metadata").write_bytes(flipped)
        try:
            found = reshard.open(folder).catalog
        except ReshardError:
            continue
        unchanged += 1
        assert found.entries == good.entries, bit
    assert unchanged < 100
