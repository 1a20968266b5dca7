"""The verdict on two models, by thresholds that are defined here and recorded in every report.

Measured on SmolLM2-135M, logits on the shipped text against float32 (relative difference, mean KL):

    run in bfloat16                           0.0153    0.0012
    run in float16                            0.0021    0.00002
    weights rounded to 8 bits a row           0.0421    0.0057
    20 steps of AdamW at 1e-6 on one sentence 0.0047    0.0001

So logits show a difference larger than 16-bit rounding, but a short training makes a smaller one:
there only the weights distinguish the two, and they are compared first.
"""

from __future__ import annotations

from reshard.evaluate.report import Logits, Thresholds, Verdict, Weights

THRESHOLDS = Thresholds(mean_kl=0.005, relative_difference=0.04, score_difference=0.02)


def judge_logits(logits: Logits, weights: Weights | None) -> tuple[Verdict | None, str]:
    """The verdict on two models that give logits, and what it rests on.

    The weights decide where both folders hold the same names: equal logits of different weights
    are not "identical", and weights that differ by more than rounding make another model,
    however close its logits. Elsewhere the logits decide alone.
    """
    if logits.max_difference is None or logits.mean_kl is None:
        return None, "The logits hold NaN or infinity, so they cannot be compared."
    relative = logits.relative_difference or 0.0
    figures = f"mean KL {logits.mean_kl:.2g} nats a token, relative difference {relative:.2g}"
    if logits.vocabulary[0] != logits.vocabulary[1] and weights is None:
        figures += f", vocabularies of {logits.vocabulary[0]} and {logits.vocabulary[1]}"
    close = logits.mean_kl <= THRESHOLDS.mean_kl and relative <= THRESHOLDS.relative_difference
    return _judge(logits.max_difference == 0, close, figures, weights)


def judge_scores(difference: float | None, weights: Weights | None) -> tuple[Verdict | None, str]:
    """The verdict on two models that give scores; `difference` is None if the heads differ."""
    if difference is None:
        return "another model", "The scores are not of the same heads, or not finite."
    figures = f"largest difference of two scores {difference:.2g}"
    return _judge(difference == 0, difference <= THRESHOLDS.score_difference, figures, weights)


def _judge(equal: bool, close: bool, figures: str, weights: Weights | None) -> tuple[Verdict, str]:
    if weights is None:
        if equal:
            return "identical", "Every output is equal."
        if close:
            return "same model, other rounding", f"Within the thresholds: {figures}."
        return "another model", f"Beyond the thresholds: {figures}."
    if weights.different:
        shares = f"{weights.different} of {weights.tensors} shared tensors"
        return "another model", f"{shares} differ by more than rounding; {figures}."
    alone = weights.only_here + weights.only_there
    lone = f"; {alone} tensors are not in the other folder" if alone else ""
    if equal and not weights.rounded:
        shares = f"all {weights.tensors} shared tensors"
        return "identical", f"Every output and {shares} are equal{lone}."
    if equal or close:
        shares = f"{weights.identical} shared tensors are equal, {weights.rounded} are rounded"
        return "same model, other rounding", f"{shares}{lone}; {figures}."
    return "another model", f"The shared weights agree, the outputs do not: {figures}{lone}."
