"""Comparison of two models: their logits on the same tokens, and their weights.

The models are loaded one after the other, never together: the first leaves its logits in a
temporary folder (at most `MOST_TOKENS` tokens of text, and the prompts with their answers), the
second is compared with them position by position. Memory: one model, and the logits of one text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from reshard.evaluate.divergence import Divergence, Perplexity
from reshard.evaluate.encoding import Inputs
from reshard.evaluate.loading import Loaded

Heard = Callable[[int, int], None]

# Tokens of one forward pass over the text, and of the text in all.
WINDOW = 512
MOST_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Tokens:
    """A sequence that both models see. `text` marks those that count for the perplexity."""

    inputs: Inputs
    text: bool


def windows(tokenizer: Any, text: str) -> list[Tokens]:
    """A text as windows of `WINDOW` tokens, `MOST_TOKENS` in all; none overlap."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][:MOST_TOKENS]
    parts = [ids[start : start + WINDOW] for start in range(0, len(ids), WINDOW)]
    return [_text(part) for part in parts if len(part) > 1]


def _text(ids: Sequence[int]) -> Tokens:
    tokens = torch.tensor([list(ids)], dtype=torch.long)
    return Tokens({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, text=True)


def with_answer(inputs: Inputs, answer: Sequence[int]) -> Tokens:
    """A prompt's inputs with the tokens of its answer behind them."""
    width = inputs["input_ids"].shape[1]
    new = torch.tensor([list(answer)], dtype=torch.long)
    longer = dict(inputs)
    for name, value in inputs.items():
        if name == "input_ids":
            longer[name] = torch.cat([value, new], dim=1)
        elif value.shape == (1, width):
            # attention_mask goes on with ones; the token types of plain text are zero.
            fill = torch.ones_like(new) if name == "attention_mask" else torch.zeros_like(new)
            longer[name] = torch.cat([value, fill.to(value.dtype)], dim=1)
    return Tokens(longer, text=False)


def same_ids(ours: Sequence[Tokens], theirs: Sequence[Tokens]) -> bool:
    """Whether two tokenizers split the same texts into the same tokens."""
    if len(ours) != len(theirs):
        return False
    return all(
        bool(torch.equal(one.inputs["input_ids"], other.inputs["input_ids"]))
        for one, other in zip(ours, theirs, strict=True)
    )


class Spill:
    """The first model's logits, one file a sequence, in a folder that the caller removes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, index: int, logits: torch.Tensor) -> None:
        save_file({"logits": logits.contiguous()}, self._path(index))

    def read(self, index: int) -> torch.Tensor:
        return load_file(self._path(index))["logits"]

    def _path(self, index: int) -> Path:
        return self._folder / f"{index}.safetensors"


def logits_of(loaded: Loaded, tokens: Tokens) -> torch.Tensor:
    """The logits at every position: [tokens, vocabulary], on the CPU, in the model's own dtype."""
    with torch.inference_mode():
        output = loaded.core(**loaded.place(tokens.inputs), use_cache=False)
    return output.logits[0].cpu()


def measure_and_spill(
    loaded: Loaded, sequences: Sequence[Tokens], spill: Spill, heard: Heard
) -> Perplexity:
    """Write the first model's logits to `spill`; returns its perplexity on the text."""
    perplexity = Perplexity()
    for index, tokens in enumerate(sequences):
        logits = logits_of(loaded, tokens)
        spill.write(index, logits)
        if tokens.text:
            perplexity.add(logits, tokens.inputs["input_ids"][0])
        heard(index + 1, len(sequences))
    return perplexity


def compare_with_spill(
    loaded: Loaded, sequences: Sequence[Tokens], spill: Spill, heard: Heard
) -> tuple[Perplexity, Divergence]:
    """Run the second model over the same sequences and compare its logits with the first's."""
    perplexity, divergence = Perplexity(), Divergence()
    for index, tokens in enumerate(sequences):
        logits = logits_of(loaded, tokens)
        divergence.add(spill.read(index), logits)
        if tokens.text:
            perplexity.add(logits, tokens.inputs["input_ids"][0])
        heard(index + 1, len(sequences))
    return perplexity, divergence


def perplexity_of(loaded: Loaded, texts: Sequence[Tokens]) -> Perplexity:
    """The perplexity of a model on a text split by its own tokenizer."""
    perplexity = Perplexity()
    for tokens in texts:
        perplexity.add(logits_of(loaded, tokens), tokens.inputs["input_ids"][0])
    return perplexity
