"""Answers: one prompt at a time through `generate`, with the health of its logits watched."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from reshard.evaluate.encoding import Inputs
from reshard.evaluate.loading import Loaded
from reshard.evaluate.options import Sampling
from reshard.evaluate.report import Json

# The settings that the report records.
_SHOWN = (
    "do_sample",
    "temperature",
    "top_p",
    "top_k",
    "repetition_penalty",
    "max_new_tokens",
    "eos_token_id",
    "pad_token_id",
)


#: Called with the number of steps done and the last step's tokens, one for each row.
OnToken = Callable[[int, list[int]], None]


@dataclass(slots=True)
class Watch:
    """A logits processor that changes nothing and counts the steps with NaN or +infinity.

    -infinity is ordinary: it is how other processors forbid a token.
    """

    bad_steps: int = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if bool((scores.isnan() | scores.isposinf()).any()):
            self.bad_steps += 1
        return scores


@dataclass(slots=True)
class Clock:
    """A streamer that notes when each step's tokens reached the CPU.

    `generate` first hands over the prompt, which is not a step.
    """

    on_token: OnToken | None = None
    times: list[float] = field(default_factory=list)
    prompt_seen: bool = False

    def put(self, value: torch.Tensor) -> None:
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        self.times.append(time.perf_counter())
        if self.on_token is not None:
            self.on_token(len(self.times), value.reshape(-1).tolist())

    def end(self) -> None:
        """Do nothing: no text is pending."""


@dataclass(frozen=True, slots=True)
class Generated:
    """The new tokens of each row, padding included, and how they came."""

    rows: list[list[int]]
    began: float
    times: tuple[float, ...]
    seconds: float
    bad_steps: int


def settings(sampling: Sampling, max_new_tokens: int, tokenizer: Any, model: Any) -> dict[str, Any]:
    """Arguments of `generate`. The model's own generation config sets what is absent here.

    Where that names no end or padding token, the tokenizer's are taken.
    """
    own = model.generation_config
    arguments: dict[str, Any] = {
        "do_sample": sampling.do_sample,
        "max_new_tokens": max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "repetition_penalty": sampling.repetition_penalty,
    }
    if own.eos_token_id is None:
        arguments["eos_token_id"] = tokenizer.eos_token_id
    if own.pad_token_id is None:
        arguments["pad_token_id"] = (
            tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        )
    return {name: value for name, value in arguments.items() if value is not None}


def in_force(arguments: Mapping[str, Any], model: Any) -> dict[str, Json]:
    """The settings that a call with `arguments` runs under, for the report."""
    own = model.generation_config
    shown = {name: arguments.get(name, getattr(own, name, None)) for name in _SHOWN}
    if not shown["do_sample"]:
        shown |= {"temperature": None, "top_p": None, "top_k": None}
    return shown


def generate(
    loaded: Loaded,
    inputs: Inputs,
    arguments: Mapping[str, Any],
    *,
    watched: bool = True,
    on_token: OnToken | None = None,
) -> Generated:
    """Generate from a batch of inputs; `on_token` gets the number of steps and the new tokens.

    `watched` looks at every step's logits, which costs a pass over them; timing goes without.
    """
    clock, watch = Clock(on_token), Watch()
    placed = loaded.place(inputs)
    began = time.perf_counter()
    with torch.inference_mode():
        tokens = loaded.core.generate(
            **placed,
            **arguments,
            streamer=clock,
            logits_processor=[watch] if watched else [],
        )
    new = tokens[:, inputs["input_ids"].shape[1] :]
    rows: list[list[int]] = new.tolist()
    seconds = time.perf_counter() - began
    return Generated(rows, began, tuple(clock.times), seconds, watch.bad_steps)


def end_tokens(arguments: Mapping[str, Any], model: Any) -> frozenset[int]:
    """The tokens that end an answer."""
    value = arguments.get("eos_token_id", model.generation_config.eos_token_id)
    if value is None:
        return frozenset()
    return frozenset(value if isinstance(value, list | tuple) else [value])
