"""Is it the same model? The logits of two models on the same tokens, and their weights.

The models are loaded one after the other, never together: the first leaves its logits in a
temporary folder (at most `MOST_TOKENS` tokens of text, and the prompts with their answers), the
second is held against them position by position. Memory: one model, and the logits of one text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from reshard.evaluate.encoding import Inputs
from reshard.evaluate.loading import Loaded
from reshard.evaluate.report import Logits, finite
from reshard.evaluate.scoring import score

# Tokens of one forward pass over the text, and of the text in all.
WINDOW = 512
MOST_TOKENS = 2048
# Positions whose distributions are worked on at once: 64 x 150,000 x 8 bytes = 77 MB.
_ROWS = 64


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens that both models see. `text` marks those that count for the perplexity."""

    inputs: Inputs
    text: bool


def windows(tokenizer: Any, text: str) -> list[Tokens]:
    """A text as windows of `WINDOW` tokens, `MOST_TOKENS` in all; none overlap."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][:MOST_TOKENS]
    parts = [ids[start : start + WINDOW] for start in range(0, len(ids), WINDOW)]
    return [
        Tokens(
            {"input_ids": torch.tensor([part]), "attention_mask": torch.ones(1, len(part)).long()},
            text=True,
        )
        for part in parts
        if len(part) > 1
    ]


def with_answer(inputs: Inputs, answer: Sequence[int]) -> Tokens:
    """A prompt's inputs with the tokens of its answer behind them."""
    width = inputs["input_ids"].shape[1]
    new = torch.tensor([list(answer)], dtype=torch.long)
    longer = dict(inputs)
    for name, value in inputs.items():
        if name == "input_ids":
            longer[name] = torch.cat([value, new], dim=1)
        elif value.ndim == 2 and value.shape == (1, width):
            # attention_mask goes on with ones; the token types of plain text are zero.
            fill = torch.ones_like(new) if name == "attention_mask" else torch.zeros_like(new)
            longer[name] = torch.cat([value, fill.to(value.dtype)], dim=1)
    return Tokens(longer, text=False)


def run_logits(
    loaded: Loaded, sequences: Sequence[Tokens], on_done: Callable[[int, int], None] | None
) -> Iterator[torch.Tensor]:
    """The logits of each sequence: [tokens, vocabulary], on the CPU, as the model gives them."""
    for done, sequence in enumerate(sequences, start=1):
        with torch.inference_mode():
            output = loaded.core(**loaded.place(sequence.inputs), use_cache=False)
        yield output.logits[0].cpu()
        if on_done is not None:
            on_done(done, len(sequences))


class Spill:
    """The first model's logits, one file a sequence, in a folder that the caller removes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.count = 0

    def add(self, logits: torch.Tensor) -> None:
        save_file({"logits": logits.contiguous()}, self._path(self.count))
        self.count += 1

    def read(self, index: int) -> torch.Tensor:
        return load_file(self._path(index))["logits"]

    def _path(self, index: int) -> Path:
        return self._folder / f"{index}.safetensors"


@dataclass(slots=True)
class Perplexity:
    """Mean negative log-likelihood of the tokens of a text, exponentiated."""

    nats: float = 0.0
    tokens: int = 0

    def add(self, logits: torch.Tensor, ids: torch.Tensor) -> None:
        """Count tokens 1.. of `ids` [tokens] under the logits of the tokens before them."""
        for start in range(0, len(ids) - 1, _ROWS):
            rows = logits[: len(ids) - 1][start : start + _ROWS].double()
            targets = ids[1:][start : start + _ROWS]
            taken = torch.log_softmax(rows, dim=-1).gather(1, targets[:, None])
            self.nats -= float(taken.sum())
            self.tokens += len(targets)

    def value(self) -> float | None:
        """The perplexity; None without tokens, or where it is not finite."""
        if not self.tokens or not math.isfinite(self.nats):
            return None
        # exp overflows a double above 709 nats a token.
        return math.exp(self.nats / self.tokens) if self.nats / self.tokens < 709 else None


@dataclass(slots=True)
class Divergence:
    """How far two models' logits are apart; grows sequence by sequence."""

    positions: int = 0
    vocabulary: tuple[int, int] = (0, 0)
    max_difference: float = 0.0
    sum_difference: float = 0.0
    square_difference: float = 0.0
    square_logits: float = 0.0
    elements: int = 0
    sum_kl: float = 0.0
    max_kl: float = 0.0
    agreeing: int = 0

    def add(self, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        """Add the logits of one sequence, [tokens, vocabulary] each; the first columns that both
        have are compared, in float64."""
        self.vocabulary = (ours.shape[1], theirs.shape[1])
        shared = min(self.vocabulary)
        for start in range(0, len(ours), _ROWS):
            self._add_rows(
                ours[start : start + _ROWS, :shared].double(),
                theirs[start : start + _ROWS, :shared].double(),
            )

    def _add_rows(self, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        difference = (ours - theirs).abs()
        self.positions += len(ours)
        self.elements += ours.numel()
        self.max_difference = _worse(self.max_difference, float(difference.max()))
        self.sum_difference += float(difference.sum())
        # A constant added to a row changes no probability, so rows are centred first.
        centred = ours - ours.mean(dim=1, keepdim=True)
        apart = centred - (theirs - theirs.mean(dim=1, keepdim=True))
        self.square_logits += float(centred.square().sum())
        self.square_difference += float(apart.square().sum())
        log_p, log_q = torch.log_softmax(ours, dim=-1), torch.log_softmax(theirs, dim=-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
        self.sum_kl += float(kl.sum())
        self.max_kl = _worse(self.max_kl, float(kl.max()))
        self.agreeing += int((ours.argmax(dim=-1) == theirs.argmax(dim=-1)).sum())

    def result(self) -> Logits:
        """The figures; those that are not finite are None."""
        count, elements = max(self.positions, 1), max(self.elements, 1)
        relative = math.sqrt(self.square_difference) / max(math.sqrt(self.square_logits), 1e-300)
        return Logits(
            positions=self.positions,
            vocabulary=self.vocabulary,
            max_difference=finite(self.max_difference),
            mean_difference=finite(self.sum_difference / elements),
            relative_difference=finite(relative),
            # Rounding can leave the KL of two equal rows a hair below zero.
            mean_kl=finite(
                max(self.sum_kl / count, 0.0) if self.sum_kl == self.sum_kl else math.nan
            ),
            max_kl=finite(self.max_kl),
            top1_agreement=self.agreeing / count,
        )


def _worse(one: float, other: float) -> float:
    """The larger; NaN if either is (which Python's max would lose)."""
    return math.nan if math.isnan(one) or math.isnan(other) else max(one, other)


def score_difference(
    ours: Sequence[dict[str, float]], theirs: Sequence[dict[str, float]]
) -> float | None:
    """Largest difference of two scores of the same prompt; None if the heads are not the same."""
    largest = 0.0
    for one, other in zip(ours, theirs, strict=True):
        if one.keys() != other.keys():
            return None
        for name, value in one.items():
            largest = _worse(largest, abs(value - other[name]))
    return finite(largest)


def run_scores(loaded: Loaded, sequences: Sequence[Tokens]) -> list[dict[str, float]]:
    """The scores of each sequence."""
    return [score(loaded, sequence.inputs)[0] for sequence in sequences]
