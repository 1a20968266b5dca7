"""Faults of names and shapes, each made for real, found and repaired."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import reshard
from tests import child
from tests.doctor import models
from tests.doctor.conftest import Pairs, evidence, names, refused, repaired
from tests.folders import edit_config
from tests.naming import tables


@pytest.fixture(scope="module")
def trainer(pairs: Pairs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the Trainer's `checkpoint-N`: placeholders beside DeepSpeed's checkpoint."""
    folder = tmp_path_factory.mktemp("zero3") / "checkpoint-2"
    child.run("tests.doctor.zero3", str(pairs("llama").base), str(folder))
    for file in pairs("llama").base.glob("*token*"):
        shutil.copy(file, folder)
    shutil.copy(pairs("llama").base / "chat_template.jinja", folder)
    return folder


def test_placeholders_with_the_checkpoint_beside(
    pairs: Pairs, trainer: Path, tmp_path: Path
) -> None:
    base = pairs("llama").base
    assert {value.shape for value in models.load(trainer).values()} == {(0,)}
    diagnosis = repaired(trainer, base, tmp_path / "out", "zero3-placeholders")
    assert "21 of 21 tensors are empty" in evidence(diagnosis, "zero3-placeholders")
    truth, written = load_file(f"{trainer}.safetensors"), models.load(tmp_path / "out")
    assert written.keys() == truth.keys()
    assert all(torch.equal(written[name], truth[name]) for name in truth)
    models.loaded(tmp_path / "out")
    # Without the base nobody knows what the checkpoint's tensors should be called.
    refused(trainer, None, tmp_path / "other", "zero3-placeholders")


def test_placeholders_alone_cannot_be_mended(pairs: Pairs, tmp_path: Path) -> None:
    pair = pairs("llama")
    ill = pair.copy(tmp_path / "ill")
    tensors = models.load(ill)
    for number, name in enumerate(sorted(tensors)[:3]):
        tensors[name] = torch.ones(number % 2, dtype=torch.bfloat16)
    models.save(ill, tensors)
    for base in (None, pair.base):
        diagnosis = refused(ill, base, tmp_path / "out", "zero3-placeholders")
        assert "3 of 21 tensors are empty" in evidence(diagnosis, "zero3-placeholders")
        assert "reshard convert" in diagnosis.findings[0].fix


@pytest.mark.parametrize("prefix", ["module.", "model.", "actor.model.", "base_model.model."])
@pytest.mark.parametrize("name", ["llama", "qwen2_5_vl_tied", "mixtral"])
def test_a_prefix_before_all_names(pairs: Pairs, name: str, prefix: str, tmp_path: Path) -> None:
    pair = pairs(name)
    ill = pair.copy(tmp_path / "ill")
    models.save(ill, {prefix + key: value for key, value in models.load(ill).items()})
    diagnosis = repaired(ill, pair.base, tmp_path / "out", "wrapper-prefix")
    told = evidence(diagnosis, "wrapper-prefix")
    assert ("module" if prefix == "module." else repr(prefix)) in told
    models.assert_same_weights(tmp_path / "out", pair.healthy)


@pytest.mark.parametrize("prefix", ["module.", "model.", "actor.", "base_model.model."])
def test_a_prefix_is_known_without_the_base(pairs: Pairs, prefix: str, tmp_path: Path) -> None:
    pair = pairs("llama")
    ill = pair.copy(tmp_path / "ill")
    models.save(ill, {prefix + key: value for key, value in models.load(ill).items()})
    repaired(ill, None, tmp_path / "out", "wrapper-prefix")
    models.assert_same_weights(tmp_path / "out", pair.healthy)


def test_wrappers_inside_the_names(pairs: Pairs, tmp_path: Path) -> None:
    """As FSDP1 with activation checkpointing and torch.compile leave them."""
    pair = pairs("llama")
    ill = pair.copy(tmp_path / "ill")

    def wrapped(name: str) -> str:
        layers = name.replace("model.layers.0.", "model.layers.0._checkpoint_wrapped_module.")
        return f"_orig_mod.{layers.replace('self_attn.', 'self_attn._fsdp_wrapped_module.')}"

    models.save(ill, {wrapped(name): value for name, value in models.load(ill).items()})
    for base, out in ((pair.base, "with"), (None, "without")):
        diagnosis = repaired(ill, base, tmp_path / out, "wrapper-prefix")
        told = evidence(diagnosis, "wrapper-prefix")
        assert "_checkpoint_wrapped_module, _fsdp_wrapped_module, _orig_mod" in told
        models.assert_same_weights(tmp_path / out, pair.healthy)


def test_two_names_that_become_one_are_not_mended(pairs: Pairs, tmp_path: Path) -> None:
    ill = pairs("llama").copy(tmp_path / "ill")
    tensors = models.load(ill)
    tensors["module.model.norm.weight"] = tensors["model.norm.weight"]
    models.save(ill, tensors)
    refused(ill, None, tmp_path / "out", "wrapper-prefix")


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen2_5_vl_tied", "mixtral", "llava"])
def test_the_names_of_a_loaded_model(pairs: Pairs, name: str, tmp_path: Path) -> None:
    pair = pairs(name)
    ill = pair.copy(tmp_path / "ill")
    state = models.loaded(pair.healthy).state_dict()
    tied = name.endswith("tied")
    if tied:
        del state["lm_head.weight"]
    models.save(ill, state)
    diagnosis = repaired(ill, pair.base, tmp_path / "out", "in-memory-names")
    told = evidence(diagnosis, "in-memory-names")
    assert ("experts" if name == "mixtral" else "model.language_model.**") in told
    models.assert_same_weights(tmp_path / "out", pair.healthy)
    # By the config alone it is seen as well; what to do about it only the base says.
    told = evidence(refused(ill, None, tmp_path / "no", "in-memory-names"), "in-memory-names")
    assert "transformers 5" in told or "transformers 4.52" in told


@pytest.mark.parametrize("version", ["4.57", "5.23"])
@pytest.mark.parametrize("name", tables.names("5.23"))
def test_every_layout_of_a_loaded_model_is_known(name: str, version: str, tmp_path: Path) -> None:
    table = tables.table(version, name)
    released = tables.table(models.RELEASED, name)
    strange = table.memory.keys() - released.disk.keys() - {"lm_head.weight"}
    folder = tmp_path / "model"
    models.write(folder, name, 0)
    state = tables.random_arrays(table.memory)
    models.save(folder, {key: torch.from_numpy(value) for key, value in state.items()})
    found = names(reshard.doctor(folder))
    # A backbone's names under its own class are those of that class's files.
    assert ("in-memory-names" in found) == bool(strange) or name.endswith("backbone")


@pytest.mark.parametrize("with_base", [True, False])
def test_experts_that_transformers_5_turned(pairs: Pairs, with_base: bool, tmp_path: Path) -> None:
    pair = pairs("qwen3_vl_moe")
    ill = pair.copy(tmp_path / "ill")
    models.save(ill, models.loaded(pair.healthy).state_dict())
    if not with_base:
        diagnosis = refused(ill, None, tmp_path / "out", "transposed-experts")
        assert "(3, 24, 32), not (3, 32, 24)" in evidence(diagnosis, "transposed-experts")
        return
    diagnosis = repaired(ill, pair.base, tmp_path / "out", "transposed-experts")
    assert "4 stacked tensors" in evidence(diagnosis, "transposed-experts")
    models.assert_same_weights(tmp_path / "out", pair.healthy)


def test_tensors_that_are_not_there_or_too_many(pairs: Pairs, tmp_path: Path) -> None:
    pair = pairs("llama")
    ill = pair.copy(tmp_path / "ill")
    tensors = models.load(ill)
    del tensors["model.norm.weight"]
    models.save(ill, tensors)
    diagnosis = refused(ill, pair.base, tmp_path / "out", "names-do-not-fit")
    assert "1 of the base's tensors are missing: model.norm.weight" in evidence(
        diagnosis, "names-do-not-fit"
    )
    assert "--fill-from-base" in diagnosis.findings[0].fix
    tensors["model.other.weight"] = torch.zeros(5)
    models.save(ill, tensors)
    told = evidence(
        refused(ill, pair.base, tmp_path / "out", "names-do-not-fit"), "names-do-not-fit"
    )
    assert "1 tensors are not in the base: model.other.weight" in told


def test_an_embedding_under_the_name_of_its_head(pairs: Pairs, tmp_path: Path) -> None:
    """A conversion reads it so; a model that transformers 4 loads must have the embedding."""
    pair = pairs("llama_tied")
    ill = pair.copy(tmp_path / "ill")
    tensors = models.load(ill)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    models.save(ill, tensors)
    diagnosis = refused(ill, pair.base, tmp_path / "out", "names-do-not-fit")
    assert "1 of the base's tensors are missing: model.embed_tokens.weight" in evidence(
        diagnosis, "names-do-not-fit"
    )


def test_another_models_base(pairs: Pairs, tmp_path: Path) -> None:
    refused(pairs("llama").healthy, pairs("mixtral").base, tmp_path / "out", "names-do-not-fit")


def test_several_faults_at_once(pairs: Pairs, tmp_path: Path) -> None:
    pair = pairs("llava")
    ill = pair.copy(tmp_path / "ill")
    state = models.loaded(pair.healthy).state_dict()
    models.save(ill, {f"module.model.{name}": value for name, value in state.items()})
    edit_config(ill, dtype="float16")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
                 "preprocessor_config.json", "generation_config.json"):  # fmt: skip
        (ill / file).unlink(missing_ok=True)
    repaired(
        ill, pair.base, tmp_path / "out",
        "wrapper-prefix", "in-memory-names", "dtype-contradicts-config", "tokenizer-missing",
        "processor-missing", "chat-template-missing", "generation-config-missing",
    )  # fmt: skip
    models.assert_same_weights(tmp_path / "out", pair.healthy)
