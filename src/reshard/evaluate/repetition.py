"""Findings about a model's answers: one repeated token, loops, tokens that do not exist."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from reshard.core.findings import Finding
from reshard.evaluate.report import Answer, Json

# Prompts in a finding's evidence.
_SHOWN = 10
# An answer shorter than this says nothing about repetition.
_LONG_ANSWER = 16
# Share of an answer's tokens that are one and the same.
_ONE_TOKEN_SHARE = 0.8
# An answer whose last half goes round in a cycle of at most this many tokens.
_LONGEST_CYCLE = 32


def check_answers(answers: Sequence[Answer], tokens: int) -> list[Finding]:
    """Findings about what was generated; `tokens` is the tokenizer's size.

    In the evidence a prompt is named by its number, from 1.
    """
    long = {
        str(number): answer.token_ids
        for number, answer in enumerate(answers, start=1)
        if len(answer.token_ids) >= _LONG_ANSWER
    }
    repeating = {
        number: found
        for number, new in long.items()
        if (found := _commonest(new))[1] >= _ONE_TOKEN_SHARE
    }
    loops = {
        number: length
        for number, new in long.items()
        if number not in repeating and (length := _cycle(new))
    }
    return [
        *_outside(answers, tokens),
        *_repeating(repeating, len(long)),
        *_looping(loops, len(long)),
    ]


def _outside(answers: Sequence[Answer], tokens: int) -> list[Finding]:
    outside = {
        str(number): max(answer.token_ids)
        for number, answer in enumerate(answers, start=1)
        if answer.token_ids and max(answer.token_ids) >= tokens
    }
    if not outside:
        return []
    message = f"{len(outside)} answers hold tokens that the tokenizer does not have."
    evidence: dict[str, Json] = {"tokenizer_tokens": tokens, "prompts": _first(outside)}
    return [Finding("generation-outside-vocabulary", message, evidence=evidence)]


def _repeating(repeating: Mapping[str, tuple[int, float]], long: int) -> list[Finding]:
    """An error only if every long answer is one repeated token: a prompt may ask for one."""
    if not repeating:
        return []
    every = len(repeating) == long
    code = "generation-repeats-token" if every else "answer-repeats-token"
    shown = {n: {"token": token, "share": share} for n, (token, share) in repeating.items()}
    message = f"{len(repeating)} of {long} long answers repeat one token."
    return [Finding(code, message, evidence={"prompts": _first(shown)})]


def _looping(loops: Mapping[str, int], long: int) -> list[Finding]:
    """A warning: small models fall into a loop on ordinary prompts."""
    if not loops:
        return []
    message = f"{len(loops)} of {long} long answers end in a loop."
    evidence: dict[str, Json] = {"tokens_in_loop": _first(loops)}
    return [Finding("generation-loops", message, evidence=evidence)]


def _first(prompts: Mapping[str, Any]) -> dict[str, Any]:
    return dict(list(prompts.items())[:_SHOWN])


def check_logits(bad_steps: int) -> list[Finding]:
    """A finding if the model's logits were NaN or infinite at some step of an answer."""
    if not bad_steps:
        return []
    message = f"The logits of {bad_steps} steps hold NaN or infinity."
    return [Finding("logits-not-finite", message, evidence={"steps": bad_steps})]


def _commonest(tokens: Sequence[int]) -> tuple[int, float]:
    """The most frequent token and its share."""
    token = max(set(tokens), key=tokens.count)
    return token, tokens.count(token) / len(tokens)


def _cycle(tokens: Sequence[int]) -> int:
    """Length of the cycle that the last half goes round in at least twice; 0 if it does not.

    >>> _cycle([9, 9, 8, 7, 1, 2, 3, 1, 2, 3, 1, 2, 3])
    3
    """
    half = tokens[len(tokens) // 2 :]
    for length in range(1, min(_LONGEST_CYCLE, len(half) // 2) + 1):
        if all(half[i] == half[i - length] for i in range(length, len(half))):
            return length
    return 0
