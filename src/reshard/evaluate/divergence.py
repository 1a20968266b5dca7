"""Differences of two models on the same tokens: logits, KL divergence, perplexity, scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from reshard.evaluate.report import Logits, finite

# Positions that are computed at once: 64 x 150,000 x 8 bytes = 77 MB.
_ROWS = 64


@dataclass(slots=True)
class Perplexity:
    """Mean negative log-likelihood of the tokens of a text, exponentiated."""

    nats: float = 0.0
    tokens: int = 0

    def add(self, logits: torch.Tensor, ids: torch.Tensor) -> None:
        """Count tokens 1.. of `ids` [tokens] under the logits of the tokens before them."""
        for start in range(0, len(ids) - 1, _ROWS):
            rows = logits[: len(ids) - 1][start : start + _ROWS].double()
            following = ids[1:][start : start + _ROWS]
            taken = torch.log_softmax(rows, dim=-1).gather(1, following[:, None])
            self.nats -= float(taken.sum())
            self.tokens += len(following)

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
            # Rounding can make the KL of two equal rows slightly negative.
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
