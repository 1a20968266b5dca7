"""From any folder that a person would name to the checkpoint that is meant."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed import checkpoint as dcp

import reshard
from reshard.formats import tags
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
    assert f"using {run / '_actor'}, tag global_step2 (one of 2)." in catalog.findings[0].message
    assert all(found.severity == "info" for found in catalog.findings)


def test_a_tag_chooses_from_above(run: Path) -> None:
    assert reshard.open(run, tag="global_step1").tag == "global_step1"


def test_to_be_named_from_above_is_mere_information(
    run: Path, oracle: Oracle, tmp_path: Path
) -> None:
    base = reshard.convert(oracle["two-tags"].last.path, tmp_path / "base")
    assert [found.code for found in base.findings] == ["no-base"]
    report = reshard.convert(run, tmp_path / "out", strict=["no-checksums"])
    assert report.warnings[0].startswith("using ")
    with pytest.raises(reshard.PlanError, match="refuses the finding checkpoint-taken: using"):
        reshard.convert(run, tmp_path / "no", strict=["no-checksums", "checkpoint-taken"])
    with pytest.raises(reshard.PlanError, match=r"refuses the finding no-base: .*Pass --base\."):
        reshard.convert(run, tmp_path / "no", strict=True)
    assert not (tmp_path / "no").exists()


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
    assert "(the newest complete one of 2)" in checkpoint.catalog.findings[0].message


def test_an_incomplete_save_is_passed_over_and_said_so(oracle: Oracle, tmp_path: Path) -> None:
    for step in (9, 10):
        shutil.copytree(oracle["two-tags"].root, tmp_path / f"checkpoint-{step}")
    broken = next((tmp_path / "checkpoint-10" / "global_step2").glob("*rank_1*optim*"))
    broken.unlink()
    checkpoint = reshard.open(tmp_path)
    assert checkpoint.catalog.origin.root.parent.name == "checkpoint-9"
    messages = [found.message for found in checkpoint.catalog.findings]
    assert any("skipped, because it is incomplete" in message for message in messages)
    assert any("rank 1 of 2 is missing" in message for message in messages)


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


@pytest.fixture
def trainer(oracle: Oracle, tmp_path: Path) -> Path:
    """A run of the Hugging Face Trainer under DeepSpeed: two saves, each with the model as well."""
    case = oracle["llama-zero2"]
    for step in (10, 20):
        folder = tmp_path / "trainer" / f"checkpoint-{step}"
        shutil.copytree(case.base, folder)
        shutil.copytree(case.last.path, folder / f"global_step{step}")
        (folder / "latest").write_text(f"global_step{step}", encoding="utf-8")
    return tmp_path / "trainer"


def test_of_a_checkpoint_with_its_export_the_checkpoint_is_read(
    oracle: Oracle, trainer: Path, tmp_path: Path
) -> None:
    folder = trainer / "checkpoint-20"
    for path in (trainer, folder):
        catalog = reshard.open(path).catalog
        assert (catalog.format, catalog.origin.tag) == ("deepspeed", "global_step20")
        assert "also holds an exported model" in catalog.findings[-1].message
        assert all(found.severity == "info" for found in catalog.findings)
    assert reshard.open(folder / "model.safetensors").format == "huggingface"
    report = reshard.convert(trainer, tmp_path / "out", base=oracle["llama-zero2"].base)
    assert report.changed == report.compared


def test_what_accelerate_saves_goes_before_the_export_as_well(trainer: Path) -> None:
    folder = trainer / "checkpoint-20"
    reshard.convert(folder / "global_step20", folder / "pytorch_model_fsdp_0", to="dcp")
    for name in ("latest", "global_step20"):
        (folder / name).rename(trainer / name)
    assert reshard.open(folder).format == "dcp"
    (trainer / "global_step20").rename(folder / "global_step20")
    with pytest.raises(reshard.FormatError, match=r"more than one format \(dcp: .*; deepspeed: "):
        reshard.open(folder)


def test_a_tag_chooses_among_the_saves_of_the_trainer(trainer: Path) -> None:
    for tag in ("global_step10", "checkpoint-10"):
        checkpoint = reshard.open(trainer, tag=tag)
        assert checkpoint.tag == "global_step10"
    for path, words in (
        (trainer, r"called 'global_step11' or holds it: checkpoint-10, checkpoint-20"),
        (
            trainer / "checkpoint-20",
            r"'global_step11' is missing; the existing .*global_step20",
        ),
    ):
        with pytest.raises(reshard.NotFoundError, match=words):
            reshard.open(path, tag="global_step11")


def test_the_last_model_of_a_run_is_read_and_its_checkpoints_are_named(
    oracle: Oracle, trainer: Path
) -> None:
    shutil.copytree(oracle["llama-zero2"].base, trainer, dirs_exist_ok=True)
    catalog = reshard.open(trainer).catalog
    assert catalog.format == "huggingface"
    assert "There are 2 training checkpoints" in catalog.findings[0].message
    assert catalog.findings[0].message.endswith("trainer/checkpoint-20.")
    for tag in ("global_step10", "checkpoint-10"):
        assert reshard.open(trainer, tag=tag).tag == "global_step10"
    assert not reshard.open(oracle["llama-zero2"].base).catalog.findings


def test_of_an_incomplete_checkpoint_with_its_export_the_error_names_that(trainer: Path) -> None:
    folder = trainer / "checkpoint-20"
    next((folder / "global_step20").glob("*rank_1*optim*")).unlink()
    with pytest.raises(reshard.IncompleteError, match="Or convert the model that was exported"):
        reshard.open(folder)
    assert reshard.open(folder / "model.safetensors").tensors


def test_a_file_leads_to_the_folder_that_holds_it(trainer: Path, tmp_path: Path) -> None:
    folder = trainer / "checkpoint-20"
    reshard.convert(folder, tmp_path / "out", max_shard_size="5KB")
    index = tmp_path / "out" / "model.safetensors.index.json"
    whole = reshard.open(index)
    assert whole.tensors.keys() == reshard.open(folder).tensors.keys()
    shard = reshard.open(next((tmp_path / "out").glob("*-of-*.safetensors")))
    assert "for the whole model, name its folder" in shard.catalog.findings[0].message
    assert shard.tensors.keys() < whole.tensors.keys()
    model = reshard.open(folder / "global_step20" / "mp_rank_00_model_states.pt")
    assert "full precision are in the optimizer's files" in model.catalog.findings[0].message
    with pytest.raises(reshard.NotFoundError, match="Pass its folder: "):
        reshard.open(folder / "latest")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(reshard.NotFoundError, match=r"is not a checkpoint\.$"):
        reshard.open(tmp_path / "notes.txt")


@pytest.mark.parametrize("names", [("model", "optim"), ("pytorch_model_0", "optimizer_0")])
def test_an_optimizer_beside_the_model_is_no_second_one(
    oracle: Oracle, tmp_path: Path, names: tuple[str, str]
) -> None:
    for step in (5, 10):
        for name in names:
            reshard.convert(oracle["llama-zero2"].root, tmp_path / f"step-{step}" / name, to="dcp")
    for save in ("step-5", "step-10"):
        root = reshard.open(tmp_path / save).catalog.origin.root
        assert root == tmp_path / save / names[0]
    assert reshard.open(tmp_path / "step-5" / names[1]).tensors


def test_an_exported_model_that_is_newer_is_named_and_taken_by_its_tag(trainer: Path) -> None:
    """`save_only_model`, or a training checkpoint that was removed to save space."""
    shutil.rmtree(trainer / "checkpoint-20" / "global_step20")
    (trainer / "checkpoint-20" / "latest").unlink()
    catalog = reshard.open(trainer).catalog
    assert catalog.origin.tag == "global_step10"
    assert "checkpoint-20 is newer, and an exported model alone" in catalog.findings[1].message
    assert reshard.open(trainer, tag="checkpoint-20").format == "huggingface"
    assert len(reshard.open(trainer, tag="checkpoint-10").catalog.findings) == 2
    shutil.move(trainer / "checkpoint-20", trainer / "checkpoint-5")
    assert len(reshard.open(trainer).catalog.findings) == 2


def test_comparisons_say_which_checkpoint_they_took(trainer: Path, tmp_path: Path) -> None:
    reshard.convert(trainer, tmp_path / "out")
    found = reshard.verify(tmp_path / "out", trainer).findings
    assert any("checkpoint-20" in one.message for one in found)
    assert reshard.diff(trainer, tmp_path / "out").findings == found


# --- accelerate's save_state of a run that trains two models -----------------------------------


def _two_models(folder: Path, oracle: Oracle, kind: str) -> tuple[str, str]:
    """What accelerate 1.15 saves of two models (accelerator.py, utils/fsdp_utils.py), and the
    names of both; the second has no output head."""
    root = oracle["llama-zero2"].root
    names = {
        "dcp": ("pytorch_model_fsdp_0", "pytorch_model_fsdp_1"),
        "deepspeed": ("pytorch_model", "pytorch_model_1"),
        "torch": ("pytorch_model_fsdp.bin", "pytorch_model_fsdp_1.bin"),
        "huggingface": ("model.safetensors", "model_1.safetensors"),
    }[kind]
    folder.mkdir(parents=True)
    state = {name: torch.from_numpy(t.numpy()) for name, t in reshard.open(root).tensors.items()}
    for place, number in zip((folder / name for name in names), (0, 1), strict=True):
        if kind == "deepspeed":
            shutil.copytree(
                oracle["llama-tied-zero2" if number else "llama-zero2"].last.path, place
            )
            (folder / "latest").write_text(place.name, encoding="utf-8")
            continue
        if number:
            state.pop("lm_head.weight")
        if kind == "dcp":
            dcp.save({"model": state}, checkpoint_id=place, no_dist=True)
            dcp.save(
                {"optimizer": state}, checkpoint_id=folder / f"optimizer_{number}", no_dist=True
            )
        elif kind == "torch":
            torch.save(state, place)
        else:
            save_file(state, place)
    return names


@pytest.mark.parametrize("kind", ["dcp", "deepspeed", "torch", "huggingface"])
def test_of_two_models_the_first_is_read_and_the_other_named(
    oracle: Oracle, tmp_path: Path, kind: str
) -> None:
    folder = tmp_path / "run" / "checkpoint_3"
    first, second = _two_models(folder, oracle, kind)
    for path in (folder, folder.parent):
        catalog = reshard.open(path).catalog
        assert catalog.format == kind
        assert "lm_head.weight" in catalog.entries
        assert first in catalog.findings[-1].message
        assert second in catalog.findings[-1].message
    other = reshard.open(folder / second)
    assert "lm_head.weight" not in other.catalog.entries
    assert not other.catalog.findings
    if kind == "deepspeed":
        assert reshard.open(folder, tag=second).tag == second


def test_the_second_model_alone_is_no_optimizer(oracle: Oracle, tmp_path: Path) -> None:
    first, second = _two_models(tmp_path / "checkpoint_3", oracle, "dcp")
    shutil.rmtree(tmp_path / "checkpoint_3" / first)
    assert reshard.open(tmp_path).catalog.origin.root.name == second


def test_a_tag_by_its_number_or_as_the_latest(oracle: Oracle, run: Path, tmp_path: Path) -> None:
    """`--tag 1`, `--tag latest`, in DeepSpeed's folder, above it, and of the HF Trainer's saves."""
    for place in (oracle["two-tags"].root, run, run / "_actor"):
        for tag, meant in (("1", 1), ("2", 2), ("latest", 2), ("global_step1", 1)):
            assert reshard.open(place, tag=tag).tag == f"global_step{meant}"
    for number in (500, 600, 1000):
        shutil.copytree(
            oracle["two-tags"].last.path, tmp_path / "hft" / f"checkpoint-{number}" / "global_step9"
        )
    for tag, number in (("500", 500), ("checkpoint-600", 600), ("latest", 1000)):
        root = reshard.open(tmp_path / "hft", tag=tag).catalog.origin.root
        assert root.relative_to(tmp_path / "hft").parts[0] == f"checkpoint-{number}"


def test_a_tag_that_is_not_there_names_the_nearest(run: Path, oracle: Oracle) -> None:
    with pytest.raises(reshard.NotFoundError, match=r"Did you mean global_step[12] or"):
        reshard.open(oracle["two-tags"].root, tag="global_stp2")
    with pytest.raises(reshard.NotFoundError, match=r"global_step1, global_step2\. Name one"):
        reshard.open(oracle["two-tags"].root, tag="3")
    for tag in ("3", "checkpoint-7"):
        with pytest.raises(reshard.NotFoundError):
            reshard.open(run, tag=tag)


def test_tags_are_listed_by_number_and_not_all() -> None:
    names = [f"checkpoint-{number}" for number in range(100, 3100, 100)]
    assert tags.listed(["checkpoint-1000", "checkpoint-500"]) == "checkpoint-500, checkpoint-1000"
    assert tags.listed(names).startswith("20 more, checkpoint-2100, ")
    assert tags.meant("1", ["a1", "b1"]) is None


def test_adapters_side_by_side_are_listed(tmp_path: Path) -> None:
    """PEFT saves each adapter of a model into a folder of its name; none of them is the newest."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1}')
        tensors = {f"base_model.model.q.lora_{side}.weight": torch.ones(1, 1) for side in "AB"}
        save_file(tensors, tmp_path / name / "adapter_model.safetensors")
    with pytest.raises(reshard.ReshardError, match="it holds several adapters: one, two") as caught:
        reshard.open(tmp_path)
    assert caught.value.hint == "Name one of them."
    assert len(reshard.open(tmp_path / "one").tensors) == 2
    for number, name in enumerate(("one", "two")):
        (tmp_path / name).rename(tmp_path / f"checkpoint-{number}")
    assert reshard.open(tmp_path).catalog.origin.root == tmp_path / "checkpoint-1"
