"""From any folder that a person would name to the checkpoint that is meant."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import reshard
from tests.oracle.cache import Oracle


@pytest.fixture
def run(oracle: Oracle, tmp_path: Path) -> Path:
    """A LightRFT run: actor and critic, two saves each."""
    for model in ("_actor", "_critic"):
        shutil.copytree(oracle["two-tags"].root, tmp_path / "run" / model)
    return tmp_path / "run"


def test_every_level_leads_to_the_newest_save_of_the_actor(run: Path) -> None:
    for path in (run, run / "_actor", run / "_actor" / "global_step2"):
        checkpoint = reshard.open(path)
        assert checkpoint.catalog.origin.root == run / "_actor" / "global_step2"
    catalog = reshard.open(run).catalog
    assert "_actor" in catalog.remarks[0]
    assert not catalog.notes


def test_a_tag_chooses_from_above(run: Path) -> None:
    assert reshard.open(run, tag="global_step1").tag == "global_step1"


def test_to_be_named_from_above_is_no_finding(run: Path, tmp_path: Path) -> None:
    report = reshard.convert(run, tmp_path / "out", strict=True)
    assert "was taken" in report.warnings[0]


def test_the_tag_does_not_depend_on_how_the_folder_is_named(
    oracle: Oracle, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run / "_actor" / "global_step2"
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    for path in (".", tmp_path / "link", folder):
        assert reshard.open(path).tag == "global_step2"
    nested = oracle["nested-tag"].last
    assert "/" in nested.save.tag
    assert reshard.open(nested.path).tag == nested.save.tag
    assert reshard.open(nested.path, tag=nested.save.tag).tag == nested.save.tag


def test_a_tag_is_refused_where_there_is_one_checkpoint(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "step-7"
    reshard.convert(run, out)
    assert reshard.open(out, tag="step-7").tensors
    with pytest.raises(reshard.NotFoundError, match="no save 'step-8' here"):
        reshard.open(out, tag="step-8")


def test_the_part_under_a_prefix_whatever_the_format(oracle: Oracle) -> None:
    root = oracle["llama-zero2"].root
    names = [name for name in reshard.open(root).tensors if name.startswith("model.")]
    part = reshard.open(root, prefix="model")
    assert list(part.tensors) == [name.removeprefix("model.") for name in names]
    with pytest.raises(reshard.NamesError, match="no tensor lies under the prefix 'wrong'"):
        reshard.open(root, prefix="wrong")


def test_without_latest_the_highest_number_is_taken_not_the_last_in_the_alphabet(
    oracle: Oracle, tmp_path: Path
) -> None:
    """`checkpoint-N`, as the Hugging Face Trainer has them, each with a DeepSpeed save inside."""
    for step in (9, 10):
        shutil.copytree(oracle["two-tags"].root, tmp_path / f"checkpoint-{step}")
    checkpoint = reshard.open(tmp_path)
    assert checkpoint.catalog.origin.root.parent.name == "checkpoint-10"
    assert "of the 2 checkpoints" in checkpoint.catalog.remarks[0]


def test_an_incomplete_save_is_passed_over_and_said_so(oracle: Oracle, tmp_path: Path) -> None:
    for step in (9, 10):
        shutil.copytree(oracle["two-tags"].root, tmp_path / f"checkpoint-{step}")
    broken = next((tmp_path / "checkpoint-10" / "global_step2").glob("*rank_1*optim*"))
    broken.unlink()
    checkpoint = reshard.open(tmp_path)
    assert checkpoint.catalog.origin.root.parent.name == "checkpoint-9"
    assert any("passed over as incomplete" in note for note in checkpoint.catalog.notes)
    assert any("rank 1 of 2 is missing" in note for note in checkpoint.catalog.notes)


def test_several_models_are_listed(oracle: Oracle, tmp_path: Path) -> None:
    for model in ("one", "other"):
        shutil.copytree(oracle["two-tags"].root, tmp_path / model / "checkpoint")
    with pytest.raises(reshard.NotFoundError, match=r"one/checkpoint, other/checkpoint"):
        reshard.open(tmp_path)


def test_a_folder_without_any_checkpoint_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "logs" / "deep").mkdir(parents=True)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(reshard.NotFoundError, match=r"logs/, notes.txt"):
        reshard.open(tmp_path)
