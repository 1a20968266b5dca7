"""Bases of every shape that people have, and what of their files comes along."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed import checkpoint as dcp

import reshard
from tests.models import released
from tests.models.base_shapes import (
    AFTER,
    BEFORE,
    HALVES,
    NAMES,
    SHAPES,
    State,
    bin_file,
    bin_shard_links,
    bin_shards,
    file_links,
    in_shards,
    shard_blobs,
    shard_links,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    dcp.save(AFTER, checkpoint_id=folder, no_dist=True)
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = released.write(tmp_path / "base", "llama", BEFORE)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
def test_a_base_of_any_shape(shape: Any, base: Path, run: Path, tmp_path: Path) -> None:
    shape(base)
    out = tmp_path / "out"
    report = reshard.convert(run, out, base=base)
    assert report.compared == report.changed == len(NAMES)
    files = {path.name for path in out.iterdir()}
    assert files == {"config.json", "tokenizer.json", "model.safetensors", "reshard.json"}
    assert not any(path.is_symlink() for path in out.iterdir())
    written = load_file(out / "model.safetensors")
    assert written.keys() == AFTER.keys()
    assert all(torch.equal(written[name], value) for name, value in AFTER.items())


@pytest.mark.parametrize("shape", [file_links, shard_links, shard_blobs])
def test_a_model_of_links_is_read_and_examined(shape: Any, base: Path, tmp_path: Path) -> None:
    shape(base)
    reshard.convert(base, tmp_path / "out", to="dcp")
    assert reshard.diff(base, tmp_path / "out").same
    assert not {found.code for found in reshard.doctor(base).findings} & {
        "damaged-file", "index-mismatch", "config-missing"}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
def test_tensors_filled_from_a_base_of_any_shape(shape: Any, base: Path, tmp_path: Path) -> None:
    shape(base)
    torch.save({name: AFTER[name] for name in HALVES[0]}, tmp_path / "run.pt")
    reshard.convert(tmp_path / "run.pt", tmp_path / "out", base=base, fill_from_base=True)
    written = load_file(tmp_path / "out" / "model.safetensors")
    expected = {**BEFORE, **{name: AFTER[name] for name in HALVES[0]}}
    assert all(torch.equal(written[name], value) for name, value in expected.items())


@pytest.mark.parametrize("shape", [None, bin_file, bin_shards, bin_shard_links])
def test_a_model_without_a_base_brings_its_own_files(
    shape: Any, base: Path, tmp_path: Path
) -> None:
    if shape is not None:
        shape(base)
    out = tmp_path / "out"
    report = reshard.convert(base, out, dtype="bfloat16")
    assert "no-base" not in {found.code for found in report.findings}
    assert {path.name for path in out.iterdir()} == {
        "config.json", "tokenizer.json", "model.safetensors", "reshard.json"}  # fmt: skip
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    written = load_file(out / "model.safetensors")
    assert all(torch.equal(written[name], value.bfloat16()) for name, value in BEFORE.items())
    assert written.keys() == BEFORE.keys()
    assert reshard.diff(base, out).same
    # Its config says what loaded models call the tensors.
    loaded = reshard.convert(base, tmp_path / "dcp", to="dcp", names="memory")
    assert "memory-names" in {found.code for found in loaded.findings}


def test_an_adapter_beside_a_config_is_no_model(base: Path, tmp_path: Path) -> None:
    """PEFT before safetensors, into the model's own folder: without the weights it is none."""
    (base / "model.safetensors").unlink()
    adapter = {f"base_model.model.m.lora_{part}.weight": torch.ones(2, 2) for part in "AB"}
    torch.save(adapter, base / "adapter_model.bin")
    (base / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    report = reshard.convert(base, tmp_path / "out")
    assert "no-base" in {found.code for found in report.findings}
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_damaged_bin_file_is_not_filled_from(base: Path, tmp_path: Path) -> None:
    bin_file(base)
    path = base / "pytorch_model.bin"
    data = bytearray(path.read_bytes())
    value = BEFORE["model.embed_tokens.weight"].numpy().tobytes()
    data[data.index(value) + 5] ^= 1
    path.write_bytes(data)
    state = {name: value for name, value in AFTER.items() if "embed" not in name}
    torch.save(state, tmp_path / "run.pt")
    with pytest.raises(reshard.FormatError, match="CRC-32"):
        reshard.convert(tmp_path / "run.pt", tmp_path / "out", base=base, fill_from_base=True)


def test_a_missing_shard_without_an_index(base: Path, run: Path, tmp_path: Path) -> None:
    in_shards(base, index=False)
    (base / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(reshard.IncompleteError, match=r"1 of 2 shards.*00002-of-00002"):
        reshard.convert(run, tmp_path / "out", base=base)


def test_a_config_and_tokenizer_are_no_base(base: Path, run: Path, tmp_path: Path) -> None:
    (base / "model.safetensors").unlink()
    with pytest.raises(reshard.NotFoundError, match=r"no weights.*original model"):
        reshard.convert(run, tmp_path / "out", base=base)


def test_a_base_of_another_size_is_told_and_the_names_are_listed(
    base: Path, run: Path, tmp_path: Path
) -> None:
    layers = [name for name in BEFORE if ".layers.1." not in name]
    small = {name: BEFORE[name][..., :16].contiguous() for name in layers}
    save_file(small, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(reshard.NamesError, match=r"layers +2 +1\n.*hidden size +32 +16") as caught:
        reshard.convert(run, tmp_path / "out", base=base)
    assert "reshard inspect SRC --base BASE --json" in str(caught.value)
    found = reshard.inspect(run, base=base).to_json()["base"]
    assert not found["fits"]
    assert len(found["unexpected"]) == len(BEFORE) - len(layers)


@pytest.mark.parametrize("version", ["5.2", "6.0"])
def test_names_of_a_version_that_was_never_read_are_a_finding(
    version: str, base: Path, run: Path, tmp_path: Path
) -> None:
    report = reshard.convert(
        run, tmp_path / "out", base=base, to="dcp", names="memory", transformers_version=version
    )
    unread = [found for found in report.findings if found.code == "memory-version-unknown"]
    assert len(unread) == (version == "6.0")
    assert all("6.0" in found.message and "5.23" in found.message for found in unread)


# --- what comes along ---------------------------------------------------------------------------


def module(folder: Path, name: str = "model.safetensors") -> State:
    """A layer in a folder of its own, as sentence-transformers keeps it."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"in_features": 32, "out_features": 4}))
    torch.manual_seed(5)
    state = torch.nn.Linear(32, 4).state_dict()
    if name.endswith(".bin"):
        torch.save(state, folder / name)
    else:
        save_file(state, folder / name)
    return dict(state)


def stated(base: Path) -> None:
    modules = [{"idx": 0, "name": "0", "path": ""}, {"idx": 1, "name": "1", "path": "1_Dense"}]
    (base / "modules.json").write_text(json.dumps(modules))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_weights_in_a_sub_folder_come_along(
    name: str, base: Path, run: Path, tmp_path: Path
) -> None:
    module(base / "1_Dense", name)
    stated(base)
    report = reshard.convert(run, tmp_path / "out", base=base)
    assert [f.subject for f in report.findings if f.code == "module-from-base"] == ["1_Dense"]
    copied = tmp_path / "out" / "1_Dense" / name
    assert copied.read_bytes() == (base / "1_Dense" / name).read_bytes()


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_trained_weights_go_into_their_sub_folder(name: str, base: Path, tmp_path: Path) -> None:
    before = module(base / "1_Dense", name)
    stated(base)
    trained = {key: value + 1 for key, value in before.items()}
    state = {**{f"0.auto_model.{key}": value for key, value in AFTER.items()},
             **{f"1.{key}": value for key, value in trained.items()}}  # fmt: skip
    dcp.save({"model": state}, checkpoint_id=tmp_path / "run", no_dist=True)
    out = tmp_path / "out"
    reshard.convert(tmp_path / "run", out, base=base)
    files = {path.name for path in (out / "1_Dense").iterdir()}
    assert files == {"config.json", "model.safetensors"}
    written = load_file(out / "1_Dense" / "model.safetensors")
    assert written.keys() == trained.keys()
    assert all(torch.equal(written[key], value) for key, value in trained.items())
    model = load_file(out / "model.safetensors")
    assert all(torch.equal(model[key], value) for key, value in AFTER.items())
    reshard.verify(out, tmp_path / "run")
    assert reshard.diff(tmp_path / "run", out).same


def test_a_layer_of_another_shape_is_not_taken_for_the_bases(base: Path, tmp_path: Path) -> None:
    module(base / "1_Dense")
    stated(base)
    state = {**{f"0.auto_model.{key}": value for key, value in AFTER.items()},
             "1.linear.weight": torch.zeros(9, 9)}  # fmt: skip
    torch.save(state, tmp_path / "run.pt")
    with pytest.raises(reshard.NamesError) as caught:
        reshard.convert(tmp_path / "run.pt", tmp_path / "out", base=base)
    assert "1.linear.weight" in caught.value.unexpected


def test_an_earlier_model_in_a_sub_folder_stays_behind(
    base: Path, run: Path, tmp_path: Path
) -> None:
    module(base / "checkpoint-5")
    (base / "checkpoint-5" / "trainer_state.json").write_text("{}")
    reshard.convert(run, tmp_path / "out", base=base)
    assert not (tmp_path / "out" / "checkpoint-5" / "model.safetensors").exists()


def test_a_linked_sub_folder_comes_along(base: Path, run: Path, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    module(tmp_path / "store" / "1_Dense")
    (base / "1_Dense").symlink_to(tmp_path / "store" / "1_Dense")
    (base / "loop").symlink_to(".")
    reshard.convert(run, tmp_path / "out", base=base)
    assert (tmp_path / "out" / "1_Dense" / "model.safetensors").is_file()
    assert not (tmp_path / "out" / "loop").exists()


def pipe(path: Path) -> None:
    os.mkfifo(path)


def listening(path: Path) -> None:
    # The path of a socket is short: it is made where the name fits.
    with socket.socket(socket.AF_UNIX) as made:
        here = Path.cwd()
        os.chdir(path.parent)
        try:
            made.bind(path.name)
        finally:
            os.chdir(here)


def broken(path: Path) -> None:
    path.symlink_to("nowhere")


def secret(path: Path) -> None:
    """A link by which a file of the user's would get into the output."""
    path.symlink_to("/etc/hostname")


def device(path: Path) -> None:
    path.symlink_to("/dev/null")


@pytest.mark.parametrize("nested", [False, True], ids=["top", "nested"])
@pytest.mark.parametrize("make", [pipe, listening, broken, secret, device])
def test_what_cannot_come_along_is_an_error(
    make: Any, nested: bool, base: Path, run: Path, tmp_path: Path
) -> None:
    folder = base / "extra" if nested else base
    folder.mkdir(exist_ok=True)
    make(folder / "vocab.txt")
    with pytest.raises(reshard.ReshardError, match=r"vocab\.txt"):
        reshard.convert(run, tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()
    (folder / "vocab.txt").unlink()  # what the hint says
    reshard.convert(run, tmp_path / "out", base=base)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_an_error(base: Path, run: Path, tmp_path: Path) -> None:
    (base / "vocab.txt").write_text("a")
    (base / "vocab.txt").chmod(0)
    with pytest.raises(reshard.NotFoundError, match=r"vocab\.txt.*cannot be read"):
        reshard.convert(run, tmp_path / "out", base=base)


def test_the_class_that_fsdp_named_is_the_class(base: Path, run: Path, tmp_path: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    text = json.dumps({**config, "architectures": ["FSDPLlamaForCausalLM"]})
    (base / "config.json").write_text(text)
    out = tmp_path / "out"
    report = reshard.convert(run, out, base=base)
    assert "architecture-repaired" in {found.code for found in report.findings}
    written = json.loads((out / "config.json").read_text())
    assert written == {**config, "architectures": ["LlamaForCausalLM"]}
    loaded = released.load(out, "AutoModelForCausalLM")
    assert type(loaded).__name__ == "LlamaForCausalLM"
    again = tmp_path / "again"
    shutil.copytree(base, again)
    state = {**AFTER, "score.weight": torch.ones(1, 32)}
    torch.save({k: v for k, v in state.items() if k != "lm_head.weight"}, tmp_path / "critic.pt")
    reshard.convert(tmp_path / "critic.pt", tmp_path / "critic", base=again)
    written = json.loads((tmp_path / "critic" / "config.json").read_text())
    assert written["architectures"] == ["LlamaForSequenceClassification"]
