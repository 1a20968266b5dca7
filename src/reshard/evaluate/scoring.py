"""Scores of models that do not generate text: reward models, critics, classifiers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from reshard.evaluate.encoding import Inputs
from reshard.evaluate.loading import Loaded


def score(loaded: Loaded, inputs: Inputs) -> list[dict[str, float]]:
    """The scores of each row of a batch, by head or label.

    A scalar reward model gives one in (0, 1) for each head. A classifier with a single label
    gives its value as it is, one with several the logit of each label.
    """
    placed = loaded.place(inputs)
    if loaded.reward is not None:
        columns = loaded.reward.score(placed)
    else:
        with _padding(loaded.core.config, len(inputs["input_ids"])), torch.inference_mode():
            logits = loaded.core(**placed).logits.float().cpu()
        columns = {label: logits[:, i] for i, label in enumerate(_labels(loaded, logits.shape[1]))}
    rows = len(next(iter(columns.values())))
    return [{name: float(column[row]) for name, column in columns.items()} for row in range(rows)]


@contextmanager
def _padding(config: Any, rows: int) -> Iterator[None]:
    """Name a padding token while a batch is scored: classifiers refuse a batch without one.

    Not for a single row: there the last token counts, be it the end token or not.
    """
    before = getattr(config, "pad_token_id", None)
    if before is None and rows > 1:
        end = config.eos_token_id
        config.pad_token_id = end[0] if isinstance(end, list) else end
    try:
        yield
    finally:
        config.pad_token_id = before


def _labels(loaded: Loaded, count: int) -> list[str]:
    if count == 1:
        return ["score"]
    table = loaded.core.config.id2label
    return [str(table.get(index, f"LABEL_{index}")) for index in range(count)]
