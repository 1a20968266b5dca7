"""Hints of running a model (`reshard try`): what lies in its folder, and what is installed."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from safetensors.torch import load_file, save_file

import reshard
from reshard.cli.app import reshard as command
from reshard.errors import ReshardError
from tests.evaluate import tiny
from tests.evaluate.trying import attempt
from tests.folders import edit_config
from tests.hints import tiny as small
from tests.hints.case import Case, follows
from tests.hints.folders import after, converting
from tests.hints.places import _script


def trying(folder: Path, at: Path, **more: Any) -> Callable[[], Any]:
    """A run that raises what its report says has failed."""

    def call() -> Any:
        report = attempt(folder, at, prompts=("Hello.",), max_new_tokens=2, **more)
        if report.failures:
            words = report.failures[0].message
            raise ReshardError(words, hint=words)
        return report

    return call


@follows("Install them, in reshard's folder: pip install '.[eval]'")
def without_torch(at: Path) -> Case:
    model = tiny.causal(at / "model")
    run = _script(command, "try", model, "--max-new-tokens", "2", "--test-prompts", "Hello.",
                  "--output-file", at / "report.json", "--device", "cpu")  # fmt: skip

    def bare() -> Any:
        with mock.patch.dict(sys.modules, {"transformers": None}):
            return run()

    return Case(bare, run)


@follows("Install the version that the model was trained with.")
def class_of_another_version(at: Path) -> Case:
    """The version that has the class, as the installed one with a class of that name."""
    model, name = tiny.causal(at / "model"), "LlamaOfTheFutureForCausalLM"
    edit_config(model, architectures=[name])

    def later() -> Any:
        own, there = transformers.LlamaForCausalLM, "reshard.evaluate.loading.transformers"
        with mock.patch(f"{there}.{name}", own, create=True):
            return trying(model, at)()

    return Case(trying(model, at), later)


@follows("Give it as a WAV file.")
def sound_that_cannot_be_decoded(at: Path) -> Case:
    model = tiny.qwen_audio(at / "model")
    (at / "sound.mp3").write_bytes(b"no sound")
    wave = tiny.tone(at / "sound.wav")
    return Case(trying(model, at, audio=(at / "sound.mp3",)), trying(model, at, audio=(wave,)))


@follows("Copy preprocessor_config.json and its like from the base model.")
def images_without_a_processor(at: Path) -> Case:
    whole = tiny.llava(at / "whole")
    bare = shutil.copytree(whole, at / "bare")
    files = [file for file in bare.iterdir() if "processor" in file.name]
    for file in files:
        file.unlink()

    def copied() -> Any:
        for file in files:
            shutil.copy(whole / file.name, file)
        return trying(bare, at, images=(tiny.image(at / "a.png"),))()

    return Case(trying(bare, at, images=(tiny.image(at / "a.png"),)), copied)


@follows("Its scores come from value_head.safetensors, which the trainer's own code loads.")
def backbone_beside_its_value_head(at: Path) -> Case:
    """As TRL and LlamaFactory do: the model's hidden states through the head's matrix."""
    model = tiny.causal(at / "model")
    edit_config(model, architectures=["LlamaModel"])
    width = transformers.AutoConfig.from_pretrained(model).hidden_size
    head = {"v_head.summary.weight": torch.randn(1, width), "v_head.summary.bias": torch.ones(1)}
    save_file(head, model / "value_head.safetensors")

    def scored() -> torch.Tensor:
        held = load_file(model / "value_head.safetensors")
        backbone = transformers.AutoModel.from_pretrained(model)
        states = backbone(torch.arange(5)[None]).last_hidden_state
        weight, bias = held["v_head.summary.weight"], held["v_head.summary.bias"]
        return torch.nn.functional.linear(states, weight, bias)

    return Case(trying(model, at), scored, same=lambda found: found.shape == (1, 5, 1))


@follows("Try --device cpu.")
def device_that_is_not_there(at: Path) -> Case:
    model = tiny.causal(at / "model")
    return Case(trying(model, at, device="flux:7"), trying(model, at, device="cpu"))


@follows("Convert a training checkpoint first: reshard convert SRC DST --base BASE.")
def training_checkpoint(at: Path) -> Case:
    base = tiny.causal(at / "base")
    trained = {name: value + 0.01 for name, value in load_file(base / "model.safetensors").items()}
    run = small.zero(at / "run", trained)
    convert = converting(run, at / "out", base=base)
    return Case(trying(run, at), after(convert, trying(at / "out", at)))


@follows("Set `architectures` to the class that was trained, such as Qwen2ForCausalLM.")
def bare_backbone(at: Path) -> Case:
    model = tiny.causal(at / "model")
    named = json.loads((model / "config.json").read_text())["architectures"]
    edit_config(model, architectures=["LlamaModel"])
    mend = after(lambda: edit_config(model, architectures=named), trying(model, at))
    return Case(trying(model, at), mend)


@follows("The config is that of another model.")
def config_of_another_model(at: Path) -> Case:
    model = tiny.causal(at / "model")
    own = (model / "config.json").read_bytes()
    edit_config(model, hidden_size=64, intermediate_size=96)
    return Case(
        trying(model, at),
        after(lambda: (model / "config.json").write_bytes(own), trying(model, at)),
    )


def _in_shards(at: Path) -> tuple[Path, Path]:
    reshard.convert(tiny.causal(at / "whole"), at / "model", max_shard_size="60KB")
    return at / "model", sorted((at / "model").glob("model-*.safetensors"))[1]


@follows("Copy the missing files, or convert again.")
def shard_that_was_not_copied(at: Path) -> Case:
    model, shard = _in_shards(at)
    shard.rename(at / "lost")
    return Case(trying(model, at), after(lambda: (at / "lost").rename(shard), trying(model, at)))


@follows("The file was truncated; copy it again or use another checkpoint.")
def weights_that_were_cut_short(at: Path) -> Case:
    model, shard = _in_shards(at)
    shutil.copy(shard, at / "whole.safetensors")
    os.truncate(shard, 100)
    copied = after(lambda: shutil.copy(at / "whole.safetensors", shard), trying(model, at))
    return Case(trying(model, at), copied)


def _reporting(at: Path, model: Path, *options: Path | str) -> Callable[[], Any]:
    return _script(command, "try", model, "--max-new-tokens", "2", "--test-prompts", "Hello.",
                   "--device", "cpu", *options)  # fmt: skip


@follows("Name another file with --html.")
def page_over_a_file_of_the_users(at: Path) -> Case:
    model = tiny.causal(at / "model")
    (at / "mine.html").write_text("<p>mine</p>")
    reports = ("--output-file", at / "report.json", "--html")
    return Case(_reporting(at, model, *reports, at / "mine.html"),
                _reporting(at, model, *reports, at / "page.html"),
                same=lambda _: (at / "mine.html").read_text() == "<p>mine</p>")  # fmt: skip


@follows("Name another file with --output-file.")
def report_over_a_file_of_the_users(at: Path) -> Case:
    model = tiny.causal(at / "model")
    (at / "mine.json").write_text("[]")
    return Case(_reporting(at, model, "--output-file", at / "mine.json"),
                _reporting(at, model, "--output-file", at / "report.json"),
                same=lambda _: (at / "mine.json").read_text() == "[]")  # fmt: skip


@follows("Merge it: reshard convert SRC DST --base BASE --fill-from-base.")
def adapter_in_place_of_a_model(at: Path) -> Case:
    base = tiny.causal(at / "base")
    adapter = small.adapter(at / "adapter")
    width = transformers.AutoConfig.from_pretrained(base).hidden_size
    module = f"base_model.model.{small.ADAPTED}"
    parts = {f"{module}.lora_A.weight": torch.ones(2, width),
             f"{module}.lora_B.weight": torch.ones(width, 2) / 100}  # fmt: skip
    save_file(parts, adapter / "adapter_model.safetensors", {"format": "pt"})
    merge = converting(adapter, at / "out", base=base, fill_from_base=True)
    return Case(trying(adapter, at), after(merge, trying(at / "out", at)))
