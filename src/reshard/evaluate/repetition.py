"""Findings about what a model said: one token over and over, loops, tokens that do not exist."""

from __future__ import annotations

from collections.abc import Sequence

from reshard.evaluate.report import Answer, Finding, Json, Severity

# Prompts in a finding's evidence.
_SHOWN = 10
# An answer shorter than this says nothing about repetition.
_LONG_ANSWER = 16
# Share of an answer's tokens that are one and the same.
_ONE_TOKEN_SHARE = 0.8
# An answer whose last half goes round in a cycle of at most this many tokens.
_LONGEST_CYCLE = 32


def check_answers(answers: Sequence[Answer], tokens: int, rows: int) -> list[Finding]:
    """Findings about what was generated; `tokens` is the tokenizer's size, `rows` the embedding's.

    One repeated token is an error only if every long answer is that; a loop is a warning, as
    small models fall into one on ordinary prompts.
    """
    found: list[Finding] = []
    outside = {
        answer.prompt: token for answer in answers for token in answer.token_ids if token >= tokens
    }
    if outside:
        evidence: dict[str, Json] = {
            "tokenizer_tokens": tokens,
            "embedding_rows": rows,
            "prompts": dict(list(outside.items())[:_SHOWN]),
        }
        message = f"{len(outside)} answers hold tokens that the tokenizer does not have."
        found.append(Finding("generation-outside-vocabulary", "error", message, evidence))
    long = [answer for answer in answers if len(answer.token_ids) >= _LONG_ANSWER]
    repeating = {a.prompt: _commonest(a.token_ids) for a in long}
    repeating = {p: c for p, c in repeating.items() if c[1] >= _ONE_TOKEN_SHARE}
    if repeating:
        shown: dict[str, Json] = {
            prompt: {"token": token, "share": round(share, 3)}
            for prompt, (token, share) in list(repeating.items())[:_SHOWN]
        }
        severity: Severity = "error" if len(repeating) == len(long) else "warning"
        message = f"{len(repeating)} of {len(long)} long answers repeat one token."
        found.append(Finding("generation-repeats-token", severity, message, {"prompts": shown}))
    loops: dict[str, Json] = {
        answer.prompt: cycle
        for answer in long
        if answer.prompt not in repeating and (cycle := _cycle(answer.token_ids))
    }
    if loops:
        message = f"{len(loops)} of {len(long)} long answers end in a loop."
        evidence = {"tokens_in_loop": dict(list(loops.items())[:_SHOWN])}
        found.append(Finding("generation-loops", "warning", message, evidence))
    return found


def check_logits(bad_steps: int) -> list[Finding]:
    """A finding if the model's logits were NaN or infinite at some step of an answer."""
    if not bad_steps:
        return []
    message = f"The logits of {bad_steps} steps hold NaN or infinity."
    return [Finding("logits-not-finite", "error", message, {"steps": bad_steps})]


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
