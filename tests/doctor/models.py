"""Healthy model folders as they are released, and how to tell that a folder is one again.

Names, shapes and configs are those that transformers 4.57 writes (`tests/naming/layouts`); every
folder is loaded by the installed transformers. Beside the weights lie a tokenizer with a chat
template, a generation config and, where the model sees, an image processor.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessorPil,
    WhisperFeatureExtractor,
)

from tests.naming import tables

Tensors = dict[str, torch.Tensor]

RELEASED = "4.57"
NAMES = (
    "llama",
    "llama_tied",
    "qwen2",
    "qwen2_5_vl",
    "qwen2_5_vl_tied",
    "mixtral",
    "qwen3_vl_moe",
    "llava",
)
TEMPLATE = "{% for message in messages %}<s>{{ message['content'] }}</s>{% endfor %}"


@dataclass(frozen=True)
class Pair:
    """A base model and the healthy model that was trained from it, both as released."""

    name: str
    base: Path
    healthy: Path

    def copy(self, target: Path) -> Path:
        """A copy of the healthy folder, to make ill."""
        shutil.copytree(self.healthy, target)
        return target


def make(folder: Path, name: str) -> Pair:
    """Write the pair of a model of `tests/naming/layouts`."""
    for place, seed in (("base", 1), ("healthy", 2)):
        write(folder / name / place, name, seed)
    return Pair(name, folder / name / "base", folder / name / "healthy")


def write(folder: Path, name: str, seed: int) -> None:
    table = tables.table(RELEASED, name)
    folder.mkdir(parents=True)
    arrays = tables.random_arrays(table.disk_shapes(), seed)
    # Values that bfloat16 holds: a folder may be written wider or narrower and stay the same.
    tensors = {key: torch.from_numpy(value).to(torch.bfloat16) for key, value in arrays.items()}
    save(folder, tensors)
    raw = json.loads((tables.LAYOUTS / RELEASED / f"{name}.json").read_text())
    # transformers 4.57 may write the class into text_config; released configs have it at the top.
    stated = {**table.config, "architectures": [raw["class"]]}
    config = json.dumps(stated).replace('"float32"', '"bfloat16"')
    (folder / "config.json").write_text(config)
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}\n')
    tokenizer().save_pretrained(folder)
    if "vision_config" in table.config:
        Qwen2VLImageProcessorPil().save_pretrained(folder)
    if "audio_config" in table.config:
        WhisperFeatureExtractor().save_pretrained(folder)


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of a few words, with a chat template."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *"abcdefgh"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>")
    made.chat_template = TEMPLATE
    return made


def save(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write the tensors as the folder's only weights."""
    for old in folder.glob("*.safetensors*"):
        old.unlink()
    whole = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(whole, folder / "model.safetensors", {"format": "pt"})


def load(folder: Path) -> Tensors:
    """Every tensor of a folder's safetensors files."""
    tensors: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(path))
    return tensors


def loaded(folder: Path) -> Any:
    """The model that transformers loads from a folder, with every key in its place."""
    (architecture,) = json.loads((folder / "config.json").read_text())["architectures"]
    model, info = getattr(transformers, architecture).from_pretrained(
        folder, dtype="auto", output_loading_info=True, local_files_only=True
    )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[what], (what, info[what])
    return model


def assert_same_weights(folder: Path, healthy: Path) -> None:
    """The same tensors on disk, bit for bit, and the same loaded model."""
    mine, theirs = load(folder), load(healthy)
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert mine[name].dtype == tensor.dtype, name
        assert torch.equal(mine[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert_same_model(folder, healthy)


def assert_same_model(folder: Path, healthy: Path) -> None:
    """transformers loads both, with every key in its place, and they are equal."""
    mine, theirs = loaded(folder).state_dict(), truth(healthy)
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(mine[name].float(), tensor.float()), name


@cache
def truth(healthy: Path) -> Tensors:
    """The state dict of a healthy folder's loaded model."""
    state: Tensors = loaded(healthy).state_dict()
    return state
