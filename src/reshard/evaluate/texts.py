"""The built-in prompts and the built-in text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from reshard.errors import FormatError
from reshard.storage.local import read_start
from reshard.storage.paths import file_size

# How many of the shipped prompts are asked when the user gives none.
DEFAULT_PROMPTS = 3


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt and its language, as an ISO 639-1 code; empty for a user's own."""

    text: str
    language: str = ""


def shipped_prompts() -> tuple[Prompt, ...]:
    """Short questions in eleven languages."""
    raw = json.loads(_data("prompts.json"))
    return tuple(Prompt(item["text"], item["language"]) for item in raw)


def shipped_text() -> str:
    """About 500 words of prose in five languages, written for this project."""
    return _data("perplexity.txt")


def read_text(path: Path) -> str:
    """A user's text for the perplexity; raises `FormatError` if it is not UTF-8 or empty."""
    try:
        text = read_start(path, file_size(path)).decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise FormatError(f"the text is not UTF-8: {error.reason}.", path=path) from error
    if not text.strip():
        raise FormatError("the text is empty.", path=path)
    return text


def _data(name: str) -> str:
    return (files("reshard.evaluate") / "data" / name).read_text(encoding="utf-8")
