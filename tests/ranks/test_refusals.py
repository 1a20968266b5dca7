"""Rank files that are not whole, not of one save, or not what they say: refused in words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import reshard
from reshard.errors import FormatError, IncompleteError, UnsupportedError
from tests.ranks.conftest import Ranks


def file(rank: int, world: int = 3) -> str:
    return f"model_world_size_{world}_rank_{rank}.pt"


@pytest.mark.parametrize("name", ["fsdp2-w3", "st-w3", "local-w2", "flat-w2", "odd-w4"])
def test_a_missing_rank(ranks: Ranks, tmp_path: Path, name: str) -> None:
    folder = ranks.copy(name, tmp_path)
    for gone in sorted(path for path in folder.iterdir() if "rank" in path.name)[1:2]:
        gone.unlink()
        with pytest.raises(IncompleteError, match=f"1 is missing: {gone.name}") as caught:
            reshard.open(folder)
        assert "Copy the files of all ranks" in str(caught.value)


def test_both_replicas_of_a_shard_are_missing(ranks: Ranks, tmp_path: Path) -> None:
    actor = ranks.copy("hsdp", tmp_path)
    for rank in (1, 3):
        (actor / file(rank, 4)).unlink()
    with pytest.raises(IncompleteError, match="of 4 ranks' files, 2 are missing"):
        reshard.open(actor)


def test_two_worlds_in_one_folder(ranks: Ranks, tmp_path: Path) -> None:
    actor = ranks.copy("st-w3", tmp_path)
    for rank in range(2):
        shutil.copy(ranks.copy("tied", tmp_path / str(rank)) / file(rank, 2), actor)
    with pytest.raises(IncompleteError, match="with 2 and 3 ranks") as caught:
        reshard.open(actor)
    assert file(0, 2) in str(caught.value)
    # The hint, followed: a file of the one that is meant; or the others moved away.
    assert reshard.open(actor / file(0, 2)).world_size == 2
    assert reshard.open(actor / file(1, 3)).world_size == 3
    for rank in range(2):
        (actor / file(rank, 2)).unlink()
    assert reshard.open(actor).world_size == 3


def test_fsdp_config_of_another_save(ranks: Ranks, tmp_path: Path) -> None:
    actor = ranks.copy("st-w3", tmp_path)
    config = actor / "fsdp_config.json"
    config.write_text(json.dumps({"FSDP_version": 1, "world_size": 8}), encoding="utf-8")
    with pytest.raises(
        IncompleteError, match="states 8 ranks, but the rank files have a world size"
    ):
        reshard.open(actor)
    assert reshard.open(actor / file(0)).world_size == 3
    for damaged in ("{", "[]", '{"world_size": "three"}'):
        config.write_text(damaged, encoding="utf-8")
        with pytest.raises(reshard.ReshardError, match="fsdp_config"):
            reshard.open(actor)


@pytest.mark.parametrize("name", ["st-w3", "fsdp1-w4", "local-w2"])
def test_a_copied_file_says_whose_it_is(ranks: Ranks, tmp_path: Path, name: str) -> None:
    folder = ranks.copy(name, tmp_path)
    first, second, *_ = sorted(path for path in folder.iterdir() if "rank" in path.name)
    shutil.copyfile(first, second)
    with pytest.raises(FormatError, match="its name states rank 1, but rank 0 wrote it"):
        reshard.open(folder)


def test_a_copied_file_that_does_not_say_whose_it_is(ranks: Ranks, tmp_path: Path) -> None:
    """Of even shards, with the rank edited out: then only the values tell."""
    folder = ranks.copy("fsdp1-w4", tmp_path)
    first, second = (folder / file(rank, 4) for rank in (0, 1))
    content = first.read_bytes()
    # `_rank` is pickled as a number behind its key, under the CRC-32 of the pickle: rename the key.
    for name in (first, second):
        _rewrite(
            name, content, (b"_rankq", b"_runkq"), (b"_coordinate_on_dim", b"_coordinate_on_dix")
        )
    with pytest.raises(
        IncompleteError, match="one rank's file was copied over another's"
    ) as caught:
        reshard.open(folder)
    assert second.name in str(caught.value)


def _rewrite(path: Path, content: bytes, *changes: tuple[bytes, bytes]) -> None:
    """A torch.save file with texts of its pickle replaced by others as long, CRC-32 included."""
    import io
    import zipfile

    source = zipfile.ZipFile(io.BytesIO(content))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as target:
        for info in source.infolist():
            data = source.read(info)
            if info.filename.endswith("data.pkl"):
                for old, new in changes:
                    assert len(old) == len(new)
                    data = data.replace(old, new)
            target.writestr(info.filename, data)


@pytest.mark.parametrize(
    ("name", "part", "said"),
    [
        ("st-w3", b"shards_metadata", "it lists no shards"),
        ("fsdp2-w3", b"placements", "it has no placements"),
    ],
)
def test_a_record_that_lacks_a_part(
    ranks: Ranks, tmp_path: Path, name: str, part: bytes, said: str
) -> None:
    """Of a sharded tensor and a DTensor; the file as it was saved is read."""
    folder = ranks.copy(name, tmp_path / "ill")
    ill = sorted(path for path in folder.iterdir() if "rank" in path.name)[1]
    whole = ill.read_bytes()
    _rewrite(ill, whole, (part, part[:-1] + b"x"))
    with pytest.raises(FormatError, match=said) as caught:
        reshard.open(folder)
    assert caught.value.hint == "The file is damaged, or another version of torch wrote it."
    ill.write_bytes(whole)
    assert reshard.diff(folder, ranks.copy(name, tmp_path / "well")).same


def _lacks_a_name(state: dict[str, torch.Tensor]) -> None:
    del state["b"]


def _other_shape(state: dict[str, torch.Tensor]) -> None:
    state["b"] = torch.ones(4)


def _other_dtype(state: dict[str, torch.Tensor]) -> None:
    state["b"] = torch.ones(3, dtype=torch.float16)


def _other_values(state: dict[str, torch.Tensor]) -> None:
    state["b"] = torch.zeros(3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_lacks_a_name, "1 of its names .* differ, such as 'b'"),
        (_other_shape, r"plain, float32 \(4,\) here, but plain, float32 \(3,\)"),
        (_other_dtype, r"plain, float16 \(3,\) here"),
        (_other_values, "but the values differ"),
    ],
)
def test_ranks_that_disagree(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None], said: str
) -> None:
    for rank in range(3):
        state = {"w": torch.arange(4.0), "b": torch.ones(3)}
        if rank == 2:
            change(state)
        torch.save(state, tmp_path / f"model_rank_{rank}.pt")
    with pytest.raises(FormatError, match=said) as caught:
        reshard.open(tmp_path)
    assert "model_rank_2.pt" in str(caught.value)


def test_files_of_two_saves(ranks: Ranks, tmp_path: Path) -> None:
    actor = ranks.copy("lightrft-mesh", tmp_path)
    shutil.copyfile(ranks.copy("tied", tmp_path) / file(1, 2), actor / file(1, 2))
    with pytest.raises(FormatError, match="files of different saves are mixed"):
        reshard.open(actor)


def test_a_rank_beyond_the_world(ranks: Ranks, tmp_path: Path) -> None:
    folder = ranks.copy("odd-w4", tmp_path)
    shutil.copyfile(
        folder / "pytorch_model_fsdp_0_rank3.bin", folder / "pytorch_model_fsdp_0_rank4.bin"
    )
    with pytest.raises(FormatError, match=r"rank 3 wrote it|of rank 4, and there are 4 ranks"):
        reshard.open(folder)


def test_several_models(tmp_path: Path) -> None:
    for model in ("actor", "critic"):
        for rank in range(2):
            torch.save({"w": torch.ones(2)}, tmp_path / f"{model}_rank{rank}.pt")
    with pytest.raises(reshard.NotFoundError, match="several models: actor, critic") as caught:
        reshard.open(tmp_path)
    assert "Name a file" in str(caught.value)
    assert reshard.open(tmp_path / "critic_rank1.pt").format == "ranks"


def test_the_second_model_of_a_run_is_named_by_a_file(ranks: Ranks, tmp_path: Path) -> None:
    folder = ranks.copy("odd-w4", tmp_path)
    for path in sorted(folder.iterdir()):
        shutil.copyfile(path, folder / path.name.replace("fsdp_0", "fsdp_1"))
    (found,) = reshard.open(folder).catalog.findings
    assert found.code == "several-models"
    assert "pytorch_model_fsdp_0_rank0.bin was taken" in found.message
    assert "name its file: pytorch_model_fsdp_1_rank0.bin." in found.message
    named = reshard.open(folder / "pytorch_model_fsdp_1_rank0.bin").catalog
    assert not named.findings
    assert named.origin.details["files"][0] == "pytorch_model_fsdp_1_rank0.bin"


def test_slices_that_were_copied_off_their_flat_parameter(ranks: Ranks) -> None:
    """As when the state dict is offloaded to the CPU: where they belong cannot be proven."""
    with pytest.raises(UnsupportedError, match="cannot prove where it belongs"):
        reshard.open(ranks["local-cloned"])
    assert reshard.open(ranks["st-w3"]).tensors  # SHARDED_STATE_DICT


def test_a_file_without_a_state_dict(tmp_path: Path) -> None:
    for rank in range(2):
        torch.save({"epoch": 3, "names": ["a"]}, tmp_path / f"model_rank_{rank}.pt")
    with pytest.raises(UnsupportedError, match="it holds no state dict"):
        reshard.open(tmp_path)


def test_a_name_may_state_any_number_of_ranks(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / file(0, 9_999_999))
    found = reshard.open(tmp_path).catalog.findings[0].message
    assert f"{file(1, 9_999_999)}, " in found
    assert "and 9999993 more" in found
