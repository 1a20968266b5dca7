"""A Hugging Face model folder as it lies on disk: its config, its weight files, what it is.

    config.json                      which model: `architectures`, `model_type`, sub-configs
    model.safetensors                the weights, or
    model.safetensors.index.json     {"weight_map": {tensor: file}} over several files
    reward_config.json               only in reshard's exports of scalar reward models

Nothing here imports torch or reads a weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from reshard.errors import IncompleteError, NotFoundError, UnsupportedError, listed
from reshard.formats.huggingface import INDEX, SINGLE, is_adapter, weight_map
from reshard.naming.rewards import REWARD_CONFIG, REWARD_HEAD
from reshard.naming.value_heads import VALUE_HEAD
from reshard.storage import strict_json
from reshard.storage.local import Sources, child, snapshot
from reshard.storage.paths import is_file, is_folder

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


class ModelKind(str, Enum):
    """A model's inputs and outputs, which decide its class and its prompts."""

    CAUSAL = "causal language model"
    VISION = "vision-language model"
    AUDIO = "audio-language model"
    CLASSIFIER = "sequence classifier"
    REWARD = "scalar reward model"

    @property
    def generates(self) -> bool:
        """Whether it answers with text; the others give scores."""
        return self not in (ModelKind.CLASSIFIER, ModelKind.REWARD)


@dataclass(frozen=True, slots=True)
class Folder:
    """A model folder. `architecture` is the class that its config names, None if it names none.

    `takes_images` and `takes_audio` say what its config has a tower for; a reward model takes
    what its backbone takes. `weights` are its safetensors files, a reward model's heads included;
    empty if the weights lie in another format.
    """

    path: Path
    config: Mapping[str, Any]
    kind: ModelKind
    architecture: str | None
    weights: tuple[Path, ...]

    @property
    def model_type(self) -> str | None:
        value = self.config.get("model_type")
        return value if isinstance(value, str) else None

    @property
    def takes_images(self) -> bool:
        return isinstance(self.config.get("vision_config"), dict)

    @property
    def takes_audio(self) -> bool:
        return isinstance(self.config.get("audio_config"), dict)

    @property
    def has_tokenizer(self) -> bool:
        return any(is_file(self.path / name) for name in _TOKENIZERS)

    @property
    def tied(self) -> bool | None:
        """Whether the config ties input and output embeddings; None if it does not say.

        transformers 4 wrote the flag into `text_config`, transformers 5 reads the top level.
        """
        text = self.config.get("text_config")
        for level in (self.config, text if isinstance(text, dict) else {}):
            if isinstance(level.get("tie_word_embeddings"), bool):
                return bool(level["tie_word_embeddings"])
        return None


def read_folder(path: Path) -> Folder:
    """Read what a model folder is.

    Raises `NotFoundError` (no folder, or no config in it), `FormatError` (a JSON file is broken),
    `IncompleteError` (the index names a file that is not there) and `UnsupportedError` (a model
    that neither generates nor scores text, or an adapter alone).
    """
    if not is_folder(path):
        raise NotFoundError("there is no such model folder.", path=path)
    path = snapshot(path)
    if is_adapter(path):
        raise UnsupportedError(
            "it holds a PEFT adapter, but no model.",
            path=path,
            hint="Merge it: reshard convert SRC DST --base BASE --fill-from-base.",
        )
    if not is_file(path / "config.json"):
        raise NotFoundError(
            "the folder has no config.json, so it is not a Hugging Face model.",
            path=path,
            hint="Convert a training checkpoint first: reshard convert SRC DST --base BASE.",
        )
    config = parse_json(path / "config.json")
    architecture = _architecture(config)
    kind = _kind(path, config, architecture)
    weights = _weight_files(path)
    if kind is ModelKind.REWARD and is_file(path / REWARD_HEAD):
        weights += (path / REWARD_HEAD,)
    return Folder(path, config, kind, architecture, weights)


def parse_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds; raises `FormatError` if it holds none."""
    return strict_json.read_file(path, max_nbytes=strict_json.MAX_INDEX)


def _architecture(config: Mapping[str, Any]) -> str | None:
    names = config.get("architectures")
    if isinstance(names, list) and names and isinstance(names[0], str):
        return names[0]
    return None


def _kind(path: Path, config: Mapping[str, Any], architecture: str | None) -> ModelKind:
    if is_file(path / REWARD_CONFIG):
        return ModelKind.REWARD
    if architecture is not None and architecture.endswith("ForSequenceClassification"):
        return ModelKind.CLASSIFIER
    if config.get("is_encoder_decoder") or _headless(architecture):
        raise UnsupportedError(
            f"{architecture or config.get('model_type')} neither generates text from a prompt "
            "nor scores it.",
            path=path / "config.json",
            hint="Its scores come from value_head.safetensors, which the trainer's own code loads."
            if is_file(path / VALUE_HEAD)
            else "Set `architectures` to the class that was trained, such as Qwen2ForCausalLM.",
        )
    if isinstance(config.get("vision_config"), dict):
        return ModelKind.VISION
    if isinstance(config.get("audio_config"), dict):
        return ModelKind.AUDIO
    return ModelKind.CAUSAL


def _headless(architecture: str | None) -> bool:
    """Whether the class is a bare backbone, or its head takes no prompt."""
    if architecture is None or architecture.endswith("LMHeadModel"):
        return False
    tasks = ("MaskedLM", "TokenClassification", "QuestionAnswering", "ImageClassification")
    return architecture.endswith(("Model", *(f"For{task}" for task in tasks)))


def _weight_files(path: Path) -> tuple[Path, ...]:
    if not is_file(path / INDEX):
        single = path / SINGLE
        return (single,) if is_file(single) else ()
    with Sources() as sources:
        names = sorted(set(weight_map(path, sources).values()))
    absent = [name for name in names if not is_file(child(path, name, store=True))]
    if absent:
        raise IncompleteError(
            f"{len(absent)} of {len(names)} weight files are missing: {listed(absent, 5)}.",
            path=path,
            hint="Copy the missing files, or convert again.",
        )
    return tuple(path / name for name in names)
