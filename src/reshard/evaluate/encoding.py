"""From a prompt to the tensors that a model takes: chat template, tokenizer, processor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from reshard.errors import UnsupportedError
from reshard.evaluate.folder import Folder
from reshard.evaluate.media import load_audio, load_image
from reshard.storage.paths import is_file

Inputs = dict[str, torch.Tensor]

# Qwen's vision models expect these marks around the placeholder of an image.
_VISION = ("<|vision_start|>", "<|vision_end|>")


@dataclass(frozen=True, slots=True)
class Media:
    """The media sent with every prompt: PIL images, and sound as mono samples."""

    images: tuple[Any, ...] = ()
    audio: tuple[Any, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.images or self.audio)


@dataclass(frozen=True, slots=True)
class Encoder:
    """Turns prompts into a model's inputs. `processor` is None for models of text alone, and for
    folders that lack one: then prompts of text alone still work."""

    tokenizer: Any
    processor: Any
    lists_content: bool
    chat: bool

    @property
    def has_template(self) -> bool:
        """Whether the folder comes with a chat template."""
        return bool(self._templater.chat_template)

    @property
    def _templater(self) -> Any:
        if self.processor is not None and getattr(self.processor, "chat_template", None):
            return self.processor
        return self.tokenizer

    def render(self, prompt: str, media: Media = Media()) -> str:
        """The text that the tokenizer gets: through the chat template where there is one."""
        if not (self.chat and self.has_template):
            return self._placeholders(media) + prompt
        content: Any = prompt
        if self.lists_content:
            content = [{"type": "image"}] * len(media.images)
            content += [{"type": "audio"}] * len(media.audio)
            content += [{"type": "text", "text": prompt}]
        return self._templated([{"role": "user", "content": content}])

    def render_turns(self, turns: Sequence[tuple[str, str]]) -> str:
        """A conversation as the tokenizer gets it: (role, text) in order, through the template."""
        messages = [
            {
                "role": role,
                "content": [{"type": "text", "text": text}] if self.lists_content else text,
            }
            for role, text in turns
        ]
        return self._templated(messages)

    def _templated(self, messages: list[dict[str, Any]]) -> str:
        text: str = self._templater.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return text

    def encode(self, texts: Sequence[str], media: Media = Media()) -> Inputs:
        """Rendered texts as a batch, padded on the left, each with all of `media`.

        A chat template writes the special tokens itself; raw text gets the tokenizer's own.
        """
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        arguments: dict[str, Any] = {
            "return_tensors": "pt",
            "padding": len(texts) > 1,
            "add_special_tokens": not (self.chat and self.has_template),
        }
        if not media:
            return dict(self.tokenizer(list(texts), **arguments))
        if self.processor is None:
            raise UnsupportedError(
                "images and audio need the model's processor, which the folder lacks.",
                hint="Copy preprocessor_config.json and its like from the base model.",
            )
        if media.images:
            arguments["images"] = [list(media.images) for _ in texts]
        if media.audio:
            arguments["audio"] = [sound for _ in texts for sound in media.audio]
            arguments["sampling_rate"] = sampling_rate(self.processor)
        return dict(self.processor(text=list(texts), **arguments))

    def _placeholders(self, media: Media) -> str:
        """The placeholders of images and sounds in raw text; the processor expands each of them."""
        if not media:
            return ""
        image = str(getattr(self.processor, "image_token", ""))
        if _VISION[0] in self.tokenizer.get_added_vocab():
            image = image.join(_VISION)
        begin, end = (
            getattr(self.processor, f"audio_{end}_token", "") or "" for end in ("bos", "eos")
        )
        sound = begin + str(getattr(self.processor, "audio_token", "")) + end
        return f"{image}\n" * len(media.images) + f"{sound}\n" * len(media.audio)


def sampling_rate(processor: Any) -> int:
    """Samples a second that a processor's audio must have."""
    return int(processor.feature_extractor.sampling_rate)


def load_media(
    images: Sequence[Path], audio: Sequence[Path], folder: Folder, encoder: Encoder
) -> Media:
    """Read the files that go along with the prompts.

    Raises `UnsupportedError` if the model does not take them.
    """
    for paths, takes, word in (
        (images, folder.takes_images, "images"),
        (audio, folder.takes_audio, "audio"),
    ):
        if paths and not takes:
            raise UnsupportedError(f"the model, a {folder.kind.value}, takes no {word}.")
        if paths and encoder.processor is None:
            raise UnsupportedError(
                f"{word} need the model's processor, which the folder lacks.",
                path=folder.path,
                hint="Copy preprocessor_config.json and its like from the base model.",
            )
    sounds = tuple(load_audio(path, sampling_rate(encoder.processor)) for path in audio)
    return Media(tuple(load_image(path) for path in images), sounds)


def load_encoder(folder: Folder, tokenizer: Any, *, chat: bool, remote_code: bool) -> Encoder:
    """The encoder of a folder.

    A folder without a processor gives an encoder without one. The processors of some models also
    bring one for videos, which needs torchvision; where that is not installed, the rest of the
    processor is used.
    """
    parts = folder.takes_images or folder.takes_audio
    processor = load_processor(folder, tokenizer, remote_code=remote_code) if parts else None
    return Encoder(tokenizer, processor, parts, chat)


def load_processor(folder: Folder, tokenizer: Any, *, remote_code: bool) -> Any:
    """The folder's processor, None if it has none."""
    files = ("processor_config.json", "preprocessor_config.json")
    if not any(is_file(folder.path / name) for name in files):
        return None
    options = {"trust_remote_code": remote_code, "local_files_only": True}
    try:
        return transformers.AutoProcessor.from_pretrained(folder.path, **options)
    except ImportError:
        if not folder.takes_images:
            raise
    images = transformers.AutoImageProcessor.from_pretrained(folder.path, **options)
    return _without_video(folder, images, tokenizer)


def _without_video(folder: Folder, images: Any, tokenizer: Any) -> Any:
    """The model's own processor class without its video part, which alone needs torchvision."""
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    name = PROCESSOR_MAPPING_NAMES.get(folder.model_type)
    whole = getattr(transformers, str(name), None)
    if whole is None:
        raise UnsupportedError(
            f"the processor of {folder.model_type} needs torchvision.",
            path=folder.path,
            hint="Install torchvision.",
        )
    parts = ["image_processor", "tokenizer"]
    # transformers 5 asks get_attributes(), transformers 4 reads `attributes`.
    still: Any = type(
        f"{name}WithoutVideo",
        (whole,),
        {"attributes": parts, "get_attributes": classmethod(lambda cls: parts)},
    )
    return still(images, tokenizer, chat_template=tokenizer.chat_template)
