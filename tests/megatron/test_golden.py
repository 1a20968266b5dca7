"""What megatron-core wrote becomes the very tensors that its model held."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import reshard
from reshard.containers.dcp import parsing
from tests.megatron.golden import GOLDEN, base, checkpoint, copied, digested, saved, truth, weights


@pytest.mark.parametrize("name", GOLDEN)
def test_every_tensor_is_the_one_that_megatron_held(name: str, tmp_path: Path) -> None:
    model = base(name, tmp_path / "base")
    report = reshard.convert(checkpoint(name), tmp_path / "out", base=model, dtype="keep")
    assert report.verified
    assert digested(tmp_path / "out") == truth(name)
    assert reshard.inspect(checkpoint(name), base=model).fitting.fits  # type: ignore[union-attr]


@pytest.mark.heavy
@pytest.mark.parametrize("name", GOLDEN)
def test_the_output_is_verified_against_the_checkpoint(name: str, tmp_path: Path) -> None:
    model = base(name, tmp_path / "base")
    reshard.convert(weights(checkpoint(name)), tmp_path / "out", base=model, dtype="keep")
    for given in (None, model):
        verified = reshard.verify(tmp_path / "out", checkpoint(name), base=given)
        assert verified.num_tensors == len(truth(name))


@pytest.mark.parametrize("name", GOLDEN)
def test_without_a_base_names_are_megatrons(name: str, tmp_path: Path) -> None:
    reshard.convert(checkpoint(name), tmp_path / "out")
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert {n.removeprefix("module.") for n in names} >= {"embedding.word_embeddings.weight"}
    assert not [n for n in names if "model.layers" in n or n.startswith("optimizer")]


def test_two_saves_are_compared_by_the_hubs_names(tmp_path: Path) -> None:
    name = "bridge_llama_tp2_bf16"
    first, second = copied(name, tmp_path / "a"), copied(name, tmp_path / "b")
    model = base(name, tmp_path / "base")
    reshard.convert(first, tmp_path / "out", base=model, dtype="keep")
    assert reshard.diff(first, second, base=model).same
    assert reshard.diff(first, tmp_path / "out").same
    trained = load_file(tmp_path / "out" / "model.safetensors")
    trained["model.layers.1.self_attn.k_proj.weight"][0, 0] += 1
    save_file(trained, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    found = reshard.diff(second, tmp_path / "out", base=model)
    assert [each.name for each in found.differences] == ["model.layers.1.self_attn.k_proj.weight"]


def test_layers_of_multi_token_prediction(tmp_path: Path) -> None:
    """Where the base's files have them, their copies of embedding and head are made anew."""
    name = "mlm_deepseekv3_mtp_fp32"
    model = base(name, tmp_path / "base")
    report = reshard.convert(checkpoint(name), tmp_path / "plain", base=model, dtype="keep")
    assert "layers-beyond-base" in [found.code for found in report.findings]
    held = load_file(model / "model.safetensors")
    want = truth(name)
    last = [key for key in want if key.startswith("model.layers.2.")]
    held |= {key: torch.zeros(want[key][1], dtype=torch.float32) for key in last}
    for key in ("embed_tokens", "shared_head.head"):
        held[f"model.layers.2.{key}.weight"] = torch.zeros(want["lm_head.weight"][1])
    save_file(held, model / "model.safetensors", metadata={"format": "pt"})
    reshard.convert(checkpoint(name), tmp_path / "out", base=model, dtype="keep")
    made = digested(tmp_path / "out")
    assert made.pop("model.layers.2.embed_tokens.weight") == want["model.embed_tokens.weight"]
    assert made.pop("model.layers.2.shared_head.head.weight") == want["lm_head.weight"]
    assert made == want


def test_a_critic_becomes_a_classifier(tmp_path: Path) -> None:
    name = "bridge_llama_tp2_bf16"
    model = base(name, tmp_path / "base")
    reshard.convert(checkpoint(name), tmp_path / "native")
    state = load_file(tmp_path / "native" / "model.safetensors")
    state["output_layer.weight"] = torch.full((1, 16), 0.5, dtype=torch.bfloat16)
    folder = saved(tmp_path / "run" / "global_step_5" / "critic" / "dist_ckpt", state)
    reshard.convert(folder, tmp_path / "out", base=model, dtype="keep")
    made = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(made["score.weight"], state["output_layer.weight"])
    assert "lm_head.weight" not in made
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForSequenceClassification"]


def test_padding_and_the_optimizer_are_findings(tmp_path: Path) -> None:
    name = "mlm_llama_dp2_distopt_dp_bf16"
    model = base(name, tmp_path / "base")
    report = reshard.convert(checkpoint(name), tmp_path / "out", base=model)
    codes = [found.code for found in report.findings]
    assert "optimizer-left-out" in codes
    assert codes.count("vocabulary-padded") == 2


def test_the_save_that_the_tracker_names_is_taken(tmp_path: Path) -> None:
    name = "bridge_llama_tp2_bf16"
    run = copied(name, tmp_path / "run")
    shutil.copytree(run / "iter_0000010", run / "iter_0000020")
    shutil.copytree(run / "iter_0000010", run / "release")
    assert reshard.open(run).catalog.origin.root.name == "iter_0000010"
    (run / "latest_checkpointed_iteration.txt").write_text("release", encoding="utf-8")
    assert reshard.open(run).catalog.origin.root.name == "release"
    (run / "iter_0000020" / "metadata.json").unlink()
    (run / "latest_checkpointed_iteration.txt").write_text("20", encoding="utf-8")
    found = reshard.open(run)
    assert found.catalog.origin.root.name == "iter_0000010"
    assert "incomplete-skipped" in [each.code for each in found.catalog.findings]


#: Layouts of trainers, and the folders of each that name the same model.
PLACES = {
    "bridge_llama_tp2_bf16": (".", "iter_0000010"),
    "nemo2_qwen2_tp2_bf16": ("weights",),
    "verl_megatron_v2_qwen2_pp2_bf16": ("model", "model/dist_ckpt"),
}


@pytest.mark.parametrize("name", PLACES)
def test_every_folder_that_names_it(name: str) -> None:
    read = reshard.open(checkpoint(name)).catalog
    held = weights(checkpoint(name))
    while not all((held / place).is_dir() for place in PLACES[name]):
        held = held.parent
    for place in PLACES[name]:
        found = reshard.open(held / place).catalog
        assert (found.origin.root, found.entries) == (read.origin.root, read.entries)


@pytest.mark.parametrize(
    ("layout", "places"),
    [
        ("release", (".", "release")),  # slime, for models that it starts from
        ("iter_0000010", (".", "iter_0000010")),  # ms-swift, with args.json beside
        ("v1/checkpoint-10", (".", "v1", "v1/checkpoint-10")),
        # verl up to 0.8
        ("global_step_7/actor/dist_ckpt", (".", "global_step_7", "global_step_7/actor")),
        ("global_step_7/actor/model/dist_ckpt", (".", "global_step_7/actor/model")),
    ],
)
def test_layouts_of_trainers(layout: str, places: tuple[str, ...], tmp_path: Path) -> None:
    """A folder that megatron-core wrote, where each of them puts it."""
    run = tmp_path / "run"
    shutil.copytree(weights(checkpoint("bridge_llama_tp2_bf16")), run / layout)
    (run / "args.json").write_text('{"model": "/data/model"}', encoding="utf-8")
    number = {"release": "release", "iter_0000010": "10"}.get(layout, "7")
    (run / "latest_checkpointed_iteration.txt").write_text(number, encoding="utf-8")
    for place in places:
        found = reshard.open(run / place).catalog
        assert (found.format, found.origin.root) == ("megatron", run / layout)


def test_the_plans_of_the_ranks_are_not_parsed(tmp_path: Path) -> None:
    """They are most of a large `.metadata`: what stands there is nothing to the reader."""
    run = copied("bridge_llama_tp2_bf16", tmp_path / "run")
    file = weights(run) / ".metadata"
    before = reshard.open(run).catalog
    data = file.read_bytes()
    plans = data.index(b"all_local_plans") + 40
    file.write_bytes(data[:plans] + bytes(len(data) - plans - 3) + data[-3:])
    after = reshard.open(run).catalog
    assert (after.entries, after.records) == (before.entries, before.records)
    file.write_bytes(data[:plans])
    with pytest.raises(reshard.ReshardError, match=r"\.metadata"):
        reshard.open(run)


def test_of_the_plans_nothing_is_read_but_what_they_begin_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1,000 ranks that each plan 50,000 tensors write gigabytes, behind all that is needed."""
    run = copied("bridge_llama_tp2_bf16", tmp_path / "run")
    file = weights(run) / ".metadata"
    before = reshard.open(run).catalog.entries
    data = file.read_bytes()
    end = data.index(b"all_local_plans") + 40
    with file.open("wb") as stream:
        stream.write(data[:-3] + b"N" * (1 << 17))
        stream.truncate(8 << 30)  # sparse, and longer than any pickle that is read
        stream.seek(-3, os.SEEK_END)
        stream.write(data[-3:])
    monkeypatch.setattr(parsing, "_BLOCK_NBYTES", 1000)
    reads: list[int] = []
    pread = os.pread

    def counted(fd: int, nbytes: int, offset: int) -> bytes:
        if os.fstat(fd).st_size == 8 << 30:
            reads.append(nbytes)
        return pread(fd, nbytes, offset)

    monkeypatch.setattr(os, "pread", counted)
    assert reshard.open(run).catalog.entries == before
    assert sum(reads) < end + (1 << 17)


def test_inspect_names_the_settings_of_the_run() -> None:
    shown = reshard.inspect(checkpoint("mlm_qwen3_tied_pp2_te_bf16")).to_json()
    assert json.loads(json.dumps(shown))["settings"]["kv_channels"] == 16
    assert shown["format"] == "megatron"
