"""Findings about a model that need no reference. The thresholds stand here.

`docs/try.md` lists the codes; a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from reshard.core.findings import Finding
from reshard.evaluate.encoding import Encoder
from reshard.evaluate.folder import Folder
from reshard.evaluate.loading import Gaps, Loaded
from reshard.evaluate.report import Json
from reshard.storage.paths import is_file, listing
from reshard.transfer.passes import Facts, by_value

# Names in a finding's evidence; a broken export can have thousands.
_SHOWN = 10
# Released models pad their embeddings to a round number: by up to about 900 rows.
_PADDING_ROWS = 1024


def check_weights(tensors: Iterable[Facts]) -> list[Finding]:
    """Findings about the values of the weights."""
    looks = by_value(tensors)
    return [
        *_about(
            "weights-not-finite",
            "{n} tensors hold NaN or infinity.",
            looks.not_finite,
            {
                t.name: {"nan": t.special.nan, "infinite": t.special.infinite}
                for t in looks.not_finite[:_SHOWN]
            },
        ),
        *_about(
            "zero3-placeholders",
            "{n} tensors have no elements, as placeholders left by ZeRO-3 have.",
            looks.empty,
            {t.name: list(t.shape) for t in looks.empty[:_SHOWN]},
        ),
        *_about(
            "weights-all-zero",
            "{n} matrices are zero throughout: they were never filled.",
            looks.zero,
            {t.name: list(t.shape) for t in looks.zero[:_SHOWN]},
        ),
        *_about(
            "weights-constant",
            "{n} matrices hold one value throughout.",
            looks.constant,
            {t.name: t.value for t in looks.constant[:_SHOWN]},
        ),
        *_about(
            "vectors-constant",
            "{n} vectors hold one value throughout, as before training.",
            looks.vectors,
            {t.name: t.value for t in looks.vectors[:_SHOWN]},
        ),
    ]


def _about(
    code: str,
    message: str,
    tensors: Sequence[Facts],
    shown: dict[str, Json],
) -> list[Finding]:
    if not tensors:
        return []
    evidence: dict[str, Json] = {"count": len(tensors), "tensors": shown}
    return [Finding(code, message.format(n=len(tensors)), evidence=evidence)]


def check_gaps(gaps: Gaps) -> list[Finding]:
    """Findings about names and shapes that the model's class and its files do not share."""
    findings: list[Finding] = []
    for code, names, message in (
        (
            "weights-missing",
            gaps.missing,
            "{n} weights are not in the files; transformers filled them with random numbers.",
        ),
        (
            "weights-unexpected",
            gaps.unexpected,
            "{n} tensors of the files belong to no weight of the model and were left out.",
        ),
    ):
        if names:
            evidence: dict[str, Json] = {"count": len(names), "tensors": list(names[:_SHOWN])}
            findings.append(Finding(code, message.format(n=len(names)), evidence=evidence))
    return findings


def check_files(folder: Folder, encoder: Encoder | None) -> list[Finding]:
    """Findings about files that a model of this kind should come with."""
    findings: list[Finding] = []
    if not folder.weights:
        findings.append(
            Finding(
                "weights-not-safetensors",
                "The folder has no safetensors files, so its weights were not checked.",
                evidence={"files": sorted(p.name for p in listing(folder.path) if is_file(p))[:50]},
            )
        )
    if folder.kind.generates and not is_file(folder.path / "generation_config.json"):
        findings.append(
            Finding(
                "generation-config-missing",
                "There is no generation_config.json: end tokens and sampling are guessed from "
                "the config.",
            )
        )
    if encoder is None:
        return findings
    if folder.kind.generates and not encoder.has_template:
        findings.append(
            Finding(
                "chat-template-missing",
                "The tokenizer has no chat template: prompts went in as raw text.",
            )
        )
    if encoder.lists_content and encoder.processor is None:
        findings.append(
            Finding(
                "processor-missing",
                "The folder has no processor, so reshard gives the model only text.",
            )
        )
    return findings


def check_vocabulary(loaded: Loaded, encoder: Encoder) -> list[Finding]:
    """Findings about the sizes of the embedding and the tokenizer."""
    rows = int(loaded.core.get_input_embeddings().weight.shape[0])
    tokens = len(encoder.tokenizer)
    evidence: dict[str, Json] = {"embedding_rows": rows, "tokenizer_tokens": tokens}
    if tokens > rows:
        message = f"The tokenizer makes {tokens} tokens, the embedding has only {rows} rows."
        return [Finding("tokenizer-too-large", message, evidence=evidence)]
    if rows - tokens > _PADDING_ROWS:
        message = (
            f"The embedding has {rows} rows for {tokens} tokens: more than padding explains; "
            "perhaps the tokenizer is another model's."
        )
        return [Finding("tokenizer-too-small", message, evidence=evidence)]
    return []


def check_tied(loaded: Loaded) -> list[Finding]:
    """Findings about input and output embeddings that should be one tensor and are not."""
    output = loaded.core.get_output_embeddings()
    if not loaded.folder.tied or output is None or not loaded.folder.kind.generates:
        return []
    into = loaded.core.get_input_embeddings().weight
    out = output.weight
    if out is into or out.data_ptr() == into.data_ptr():
        return []
    difference = _largest_difference(into, out)
    evidence: dict[str, Json] = {
        "input_shape": list(into.shape),
        "output_shape": list(out.shape),
        "largest_difference": difference,
    }
    if difference == 0:
        message = "The config ties the head to the embedding; they are equal but stored twice."
        return [Finding("head-stored-twice", message, evidence=evidence)]
    message = "The config ties the head to the embedding, but the files hold two that differ."
    return [Finding("head-contradicts-config", message, evidence=evidence)]


def _largest_difference(one: torch.Tensor, other: torch.Tensor) -> float | None:
    """Largest absolute difference, by blocks of rows; None where the shapes differ."""
    if one.shape != other.shape:
        return None
    largest = 0.0
    for first, second in zip(one.detach().split(4096), other.detach().split(4096), strict=True):
        block = (first.float().cpu() - second.float().cpu()).abs().max()
        largest = max(largest, float(block))
    return largest
