"""Faults of the files, each made for real, found and repaired."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import reshard
from reshard.errors import NotFoundError, PlanError, WriteError
from tests.doctor import models
from tests.doctor.conftest import Pairs, evidence, names, refused, repaired
from tests.folders import edit_config

INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(pairs: Pairs, tmp_path: Path) -> Path:
    """A healthy llama in several shards, as `save_pretrained` writes them."""
    ill = pairs("llama").copy(tmp_path / "ill")
    (ill / "model.safetensors").unlink()
    models.loaded(pairs("llama").healthy).save_pretrained(ill, max_shard_size="20KB")
    assert len(list(ill.glob("model-*-of-*.safetensors"))) == 3
    assert names(reshard.doctor(ill)) == []
    return ill


def edit_index(folder: Path, change: dict[str, str | None]) -> None:
    """Change where tensors are listed; None takes one out."""
    index = json.loads((folder / INDEX).read_text())
    weight_map = {**index["weight_map"], **change}
    index["weight_map"] = {name: file for name, file in weight_map.items() if file is not None}
    (folder / INDEX).write_text(json.dumps(index))


def assert_mended(sharded: Path, pairs: Pairs, out: Path, said: str) -> None:
    """The index is found wrong for that reason and repaired, with the base and without."""
    pair = pairs("llama")
    for base, name in ((None, "without"), (pair.base, "with")):
        diagnosis = repaired(sharded, base, out / name, "index-mismatch")
        assert said in evidence(diagnosis, "index-mismatch")
        models.assert_same_weights(out / name, pair.healthy)


def test_an_index_that_misses_a_tensor(pairs: Pairs, sharded: Path, tmp_path: Path) -> None:
    edit_index(sharded, {"model.norm.weight": None})
    with pytest.raises(reshard.FormatError):
        reshard.open(sharded)
    assert_mended(
        sharded, pairs, tmp_path / "out", "holds tensors that it does not list: model.norm"
    )


def test_an_index_that_points_to_the_wrong_file(
    pairs: Pairs, sharded: Path, tmp_path: Path
) -> None:
    index = json.loads((sharded / INDEX).read_text())["weight_map"]
    other = next(file for file in index.values() if file != index["model.norm.weight"])
    edit_index(sharded, {"model.norm.weight": other})
    assert_mended(sharded, pairs, tmp_path / "out", f"{other} lacks tensors that it lists there")


def test_an_index_of_files_under_other_names(pairs: Pairs, sharded: Path, tmp_path: Path) -> None:
    for path in sorted(sharded.glob("model-*-of-*.safetensors")):
        path.rename(path.with_name(path.name.replace("-of-0", "-of-1")))
    assert_mended(sharded, pairs, tmp_path / "out", "which does not exist")


def test_shards_without_an_index(pairs: Pairs, sharded: Path, tmp_path: Path) -> None:
    (sharded / INDEX).unlink()
    assert_mended(sharded, pairs, tmp_path / "out", f"but there is no {INDEX}")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {"a": 1}}'])
def test_an_index_that_is_none(pairs: Pairs, sharded: Path, tmp_path: Path, text: str) -> None:
    (sharded / INDEX).write_text(text)
    assert_mended(sharded, pairs, tmp_path / "out", INDEX)


def test_a_single_file_that_hides_the_shards(pairs: Pairs, sharded: Path, tmp_path: Path) -> None:
    single = pairs("llama").healthy / "model.safetensors"
    shutil.copy(single, sharded)
    assert_mended(sharded, pairs, tmp_path / "out", "loaders take model.safetensors")
    # The same with the weights of another model: only the user knows which is meant.
    shutil.copy(pairs("llama").base / "model.safetensors", sharded)
    told = evidence(refused(sharded, None, tmp_path / "no", "index-mismatch"), "index-mismatch")
    assert "21 tensors are in two files with different values" in told


def test_a_shard_that_is_not_there(pairs: Pairs, sharded: Path, tmp_path: Path) -> None:
    (lost, *_) = sorted(sharded.glob("model-*.safetensors"))
    lost.unlink()
    told = evidence(refused(sharded, None, tmp_path / "out", "index-mismatch"), "index-mismatch")
    assert f"in {lost.name}, which does not exist" in told
    base = pairs("llama").base
    refused(sharded, base, tmp_path / "out", "index-mismatch", "names-do-not-fit")


def test_an_index_that_lists_what_the_model_does_not_need(
    pairs: Pairs, sharded: Path, tmp_path: Path
) -> None:
    edit_index(sharded, {"old.weight": "model-00009-of-00009.safetensors"})
    refused(sharded, None, tmp_path / "no", "index-mismatch")
    repaired(sharded, pairs("llama").base, tmp_path / "out", "index-mismatch")


def test_an_index_cannot_lead_out_of_the_folder(sharded: Path, tmp_path: Path) -> None:
    save_file({"secret": torch.zeros(2)}, tmp_path / "other.safetensors")
    edit_index(sharded, {"secret": "../other.safetensors"})
    diagnosis = refused(sharded, None, tmp_path / "no", "index-mismatch")
    assert "../other.safetensors, which does not exist" in evidence(diagnosis, "index-mismatch")
    other = (tmp_path / "other.safetensors").rename(tmp_path / "other.secret")
    (sharded / "model-00099-of-00099.safetensors").symlink_to(other)
    diagnosis = reshard.doctor(sharded)
    assert "leaves the folder" in evidence(diagnosis, "damaged-file")


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_file_that_is_cut_off(pairs: Pairs, sharded: Path, tmp_path: Path, size: int) -> None:
    (cut, *_) = sorted(sharded.glob("model-*.safetensors"))
    os.truncate(cut, size % cut.stat().st_size)
    diagnosis = refused(sharded, None, tmp_path / "out", "damaged-file")
    assert cut.name in evidence(diagnosis, "damaged-file")
    diagnosis = reshard.doctor(sharded, base=pairs("llama").base)
    assert names(diagnosis) == ["damaged-file", "names-do-not-fit"]


def test_a_file_without_tensors(pairs: Pairs, tmp_path: Path) -> None:
    ill = pairs("llama").copy(tmp_path / "ill")
    models.save(ill, {})
    diagnosis = refused(ill, None, tmp_path / "out", "damaged-file")
    assert evidence(diagnosis, "damaged-file") == "model.safetensors: it holds no tensor."


def test_weights_in_torch_files(pairs: Pairs, tmp_path: Path) -> None:
    pair = pairs("llama_tied")
    for base, out in ((pair.base, "with"), (None, "without")):
        ill = pair.copy(tmp_path / f"ill-{out}")
        state = models.loaded(pair.healthy).state_dict()
        (ill / "model.safetensors").unlink()
        torch.save(state, ill / "pytorch_model.bin")
        assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()
        diagnosis = repaired(ill, base, tmp_path / out, "pickled-weights")
        assert evidence(diagnosis, "pickled-weights") == "the weights are in pytorch_model.bin"
        models.assert_same_weights(tmp_path / out, pair.healthy)


def test_a_torch_file_that_is_cut_off(pairs: Pairs, tmp_path: Path) -> None:
    ill = pairs("llama").copy(tmp_path / "ill")
    torch.save(models.load(ill), ill / "pytorch_model.bin")
    (ill / "model.safetensors").unlink()
    os.truncate(ill / "pytorch_model.bin", 5000)
    refused(ill, None, tmp_path / "out", "damaged-file", "pickled-weights")


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_a_config_that_is_missing_or_no_json(
    pairs: Pairs, tmp_path: Path, text: str | None
) -> None:
    pair = pairs("qwen2_5_vl")
    ill = pair.copy(tmp_path / "ill")
    (ill / "config.json").unlink()
    if text is not None:
        (ill / "config.json").write_text(text)
    refused(ill, None, tmp_path / "no", "config-missing")
    diagnosis = repaired(ill, pair.base, tmp_path / "out", "config-missing")
    assert evidence(diagnosis, "config-missing").startswith("config.json: ")
    models.assert_same_weights(tmp_path / "out", pair.healthy)
    written = (tmp_path / "out" / "config.json").read_text()
    assert json.loads(written) == json.loads((pair.base / "config.json").read_text())


def remove(folder: Path, *files: str) -> None:
    for file in files:
        (folder / file).unlink()


def test_a_missing_tokenizer(pairs: Pairs, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    pair = pairs("llama")
    ill = pair.copy(tmp_path / "ill")
    remove(ill, "tokenizer.json", "tokenizer_config.json")
    refused(ill, None, tmp_path / "no", "tokenizer-missing")
    repaired(ill, pair.base, tmp_path / "out", "tokenizer-missing")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == models.TEMPLATE


def test_a_tokenizer_without_its_config(pairs: Pairs, tmp_path: Path) -> None:
    pair = pairs("llama")
    ill = pair.copy(tmp_path / "ill")
    remove(ill, "tokenizer_config.json")
    diagnosis = repaired(ill, pair.base, tmp_path / "out", "tokenizer-missing")
    assert "no tokenizer_config.json" in evidence(diagnosis, "tokenizer-missing")


def test_the_folders_own_files_are_kept(pairs: Pairs, tmp_path: Path) -> None:
    pair = pairs("llama")
    ill = pair.copy(tmp_path / "ill")
    (ill / "tokenizer.json").write_text(
        (ill / "tokenizer.json").read_text().replace('"a"', '"new word"')
    )
    (ill / "runs").mkdir()
    (ill / "runs" / "notes.txt").write_text("trained on tuesday")
    remove(ill, "generation_config.json")
    repaired(ill, pair.base, tmp_path / "out", "generation-config-missing")
    for file in ("tokenizer.json", "config.json", "runs/notes.txt"):
        assert (tmp_path / "out" / file).read_bytes() == (ill / file).read_bytes()


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava"])
def test_a_missing_processor(pairs: Pairs, name: str, tmp_path: Path) -> None:
    pair = pairs(name)
    ill = pair.copy(tmp_path / "ill")
    remove(ill, "preprocessor_config.json")
    told = evidence(refused(ill, None, tmp_path / "no", "processor-missing"), "processor-missing")
    assert "the config has vision_config" in told
    repaired(ill, pair.base, tmp_path / "out", "processor-missing")
    name = "preprocessor_config.json"
    assert (tmp_path / "out" / name).read_bytes() == (pair.base / name).read_bytes()


@pytest.mark.parametrize("place", ["chat_template.jinja", "chat_template.json", "inside"])
def test_a_missing_chat_template(pairs: Pairs, place: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    pair = pairs("llama")
    base, ill = pair.copy(tmp_path / "base"), pair.copy(tmp_path / "ill")
    shutil.copy(pair.base / "model.safetensors", base)
    for folder in (base, ill):
        remove(folder, "chat_template.jinja")
    if place == "inside":
        config = json.loads((base / "tokenizer_config.json").read_text())
        config["chat_template"] = models.TEMPLATE
        (base / "tokenizer_config.json").write_text(json.dumps(config))
    else:
        text = (
            json.dumps({"chat_template": models.TEMPLATE}) if "json" in place else models.TEMPLATE
        )
        (base / place).write_text(text)
    assert names(reshard.doctor(ill)) == []
    diagnosis = repaired(ill, base, tmp_path / "out", "chat-template-missing")
    where = "tokenizer_config.json" if place == "inside" else place
    assert f"the base has one in {where}" in evidence(diagnosis, "chat-template-missing")
    if place != "chat_template.json":
        loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
        assert loaded.chat_template == models.TEMPLATE


def test_missing_code(pairs: Pairs, tmp_path: Path) -> None:
    pair = pairs("llama")
    base, ill = pair.copy(tmp_path / "base"), pair.copy(tmp_path / "ill")
    shutil.copy(pair.base / "model.safetensors", base)
    auto_map = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModel": "someone/else--modeling_else.Model",
        "AutoTokenizer": ["tokenization_own.Slow", None],
    }
    edit_config(ill, auto_map=auto_map)
    diagnosis = refused(ill, base, tmp_path / "no", "code-missing")
    told = evidence(diagnosis, "code-missing")
    assert told.endswith("configuration_own.py, tokenization_own.py")
    for file in ("configuration_own.py", "tokenization_own.py", "helper.py"):
        (base / file).write_text(f"# {file}\n")
    repaired(ill, base, tmp_path / "out", "code-missing")
    assert (tmp_path / "out" / "helper.py").read_text() == "# helper.py\n"


def test_what_is_no_model_folder(pairs: Pairs, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such file or folder"):
        reshard.doctor(tmp_path / "nowhere")
    with pytest.raises(NotFoundError, match="no checkpoint was recognised"):
        reshard.doctor(tmp_path)
    base = pairs("llama").base
    with pytest.raises(PlanError, match="the base itself"):
        reshard.doctor(base, base=base)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(WriteError, match="exists"):
        reshard.doctor(base, repair=tmp_path / "out")
    with pytest.raises(WriteError, match="is, or contains,"):
        reshard.doctor(base, repair=base.parent)
