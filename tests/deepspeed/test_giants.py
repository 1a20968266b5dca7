"""ZeRO-3 checkpoints laid out as those of a trillion parameters are, with fewer layers and ranks:
each parameter is cut into as many pieces as there are ranks, and none is an object before it is
read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import reshard
from benchmarks import giants
from benchmarks.giants import Size
from reshard.containers.torch import reader
from reshard.core.partition import Partition
from reshard.core.tensors import Entry
from reshard.core.tiling import check_tiling
from reshard.errors import FormatError, IncompleteError
from reshard.pages import contents
from tests.giants import check_one_shard

SIZE = Size(layers=1, experts=2, world=24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("giants") / "zero3"
    giants.make_zero3(made, SIZE)
    return made


@pytest.mark.heavy
def test_the_pieces_are_described_and_tile_each_tensor(folder: Path) -> None:
    found = reshard.inspect(folder)
    shapes = {name: shape for name, shape, _, _ in giants.tensors(SIZE)}
    entries = found.checkpoint.catalog.entries
    assert {name: entry.spec.shape for name, entry in entries.items()} == shapes
    assert found.bytes_to_read == found.total_bytes
    for entry in entries.values():
        assert isinstance(entry.fragments, Partition)
        check_tiling(Entry(entry.spec, tuple(entry.fragments)))


def test_the_pickles_of_ranks_that_say_the_same_are_parsed_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parse, count = reader._parse, 0

    def counted(*args: object, **named: object) -> object:
        nonlocal count
        count += "devices" in named and named["devices"] is not None
        return parse(*args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(reader, "_parse", counted)
    reshard.inspect(folder)
    assert count == 1


@pytest.mark.parametrize("kind", ["missing", "other shapes", "damaged"])
def test_one_rank_of_many_that_differs_is_refused(folder: Path, tmp_path: Path, kind: str) -> None:
    tag = tmp_path / "c" / "global_step100"
    tag.mkdir(parents=True)
    (tag.parent / "latest").write_text(tag.name)
    for path in (folder / tag.name).iterdir():
        os.link(path, tag / path.name)
    last = tag / "zero_pp_rank_23_mp_rank_00_model_states.pt"
    content = last.read_bytes()
    last.unlink()
    if kind == "missing":
        with pytest.raises(IncompleteError, match="rank 23 of 24"):
            reshard.inspect(tag.parent)
        return
    if kind == "damaged":
        at = content.index(b"gate_proj")
        last.write_bytes(content[:at] + b"G" + content[at + 1 :])
        with pytest.raises(FormatError, match="CRC-32"):
            reshard.inspect(tag.parent)
        return
    stated = {name: torch.Size(shape) for name, shape, _, _ in giants.tensors(SIZE)}
    stated["model.norm.weight"] = torch.Size((giants.HIDDEN + 1,))
    last.write_bytes(giants._model_file(stated, 7, SIZE))
    with pytest.raises(FormatError, match="list of parameters"):
        reshard.inspect(tag.parent)


@pytest.mark.heavy
def test_one_shard_of_it_converts(folder: Path, tmp_path: Path) -> None:
    check_one_shard(folder, tmp_path / "out")


def test_a_page_names_no_piece_of_a_tensor_that_lies_in_very_many_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 1,024 ranks there are 72 million pieces: a page can show neither them nor count them."""
    inspection = reshard.inspect(folder)
    whole = contents.contents_page(inspection)
    assert "24 files" not in whole

    def made(*_: object) -> None:
        raise AssertionError("a piece was made")

    monkeypatch.setattr(contents, "_MAX_FILES", 23)
    monkeypatch.setattr(Partition, "within", made)
    page = contents.contents_page(inspection)
    assert page.count("24 files") >= inspection.num_tensors
    assert "bf16_zero_pp_rank_23_mp_rank_00_optim_states.pt" in page
