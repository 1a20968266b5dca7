"""`--compare`: the first model's results, the second model compared with them, the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from reshard.errors import UnsupportedError
from reshard.evaluate.compare import (
    Heard,
    Spill,
    Tokens,
    compare_with_spill,
    measure_and_spill,
    perplexity_of,
    same_ids,
    windows,
    with_answer,
)
from reshard.evaluate.device import place
from reshard.evaluate.divergence import Perplexity, score_difference
from reshard.evaluate.encoding import Encoder, Inputs, Media
from reshard.evaluate.folder import Folder, read_folder
from reshard.evaluate.loading import Loaded, load_model, load_tokenizer
from reshard.evaluate.options import Options
from reshard.evaluate.report import Answer, Comparison, Weights
from reshard.evaluate.scan import read_weights
from reshard.evaluate.scoring import score
from reshard.evaluate.texts import read_text, shipped_text
from reshard.evaluate.verdict import THRESHOLDS, judge_logits, judge_scores
from reshard.evaluate.weights import compare_weights
from reshard.storage.local import Sources
from reshard.storage.paths import file_size


@dataclass(frozen=True, slots=True)
class FirstSide:
    """The results of the first model, which is released before the second is loaded.

    `prompts` are the rendered prompts' inputs, `sequences` what its logits in `spill` are of:
    the prompts with their answers, then the text. A model that only scores leaves `scores`.
    """

    folder: Folder
    encoder: Encoder
    prompts: tuple[Inputs, ...]
    rendered: tuple[str, ...]
    text: str
    sequences: tuple[Tokens, ...]
    spill: Spill
    perplexity: Perplexity
    scores: tuple[dict[str, float], ...]


def record_first(
    loaded: Loaded,
    encoder: Encoder,
    media: Media,
    asked: Sequence[tuple[str, Answer | None]],
    text: Path | None,
    spill: Path,
    heard: Heard,
) -> FirstSide:
    """Run the first model over its prompts, with the answers it gave, and over the text.

    `asked` holds each prompt and its answer, None for a model that only scores; `spill` is a
    folder for its logits, about 2 bytes x vocabulary x tokens.
    """
    rendered = tuple(encoder.render(prompt, media) for prompt, _ in asked)
    prompts = tuple(encoder.encode([one], media) for one in rendered)
    body = shipped_text() if text is None else read_text(text)
    store, perplexity = Spill(spill), Perplexity()
    sequences: tuple[Tokens, ...] = ()
    scores: tuple[dict[str, float], ...] = ()
    if loaded.folder.kind.generates:
        answers = (answer.token_ids if answer else () for _, answer in asked)
        said = (with_answer(inputs, new) for inputs, new in zip(prompts, answers, strict=True))
        sequences = (*said, *windows(encoder.tokenizer, body))
        perplexity = measure_and_spill(loaded, sequences, store, heard)
    else:
        scores = tuple(score(loaded, inputs)[0] for inputs in prompts)
    return FirstSide(
        loaded.folder, encoder, prompts, rendered, body, sequences, store, perplexity, scores
    )


def judge(first: FirstSide, options: Options, other: Path, heard: Heard) -> Comparison:
    """Load the other model and compare it with the first one's results.

    Raises what loading raises, and `UnsupportedError` if one model generates and the other scores.
    """
    folder = read_folder(other)
    if folder.kind.generates != first.folder.kind.generates:
        raise UnsupportedError(
            f"a {first.folder.kind.value} and a {folder.kind.value} cannot be compared.", path=other
        )
    weights = _compare_files(first.folder, folder, heard)
    loaded = load_model(
        folder,
        place(options.device, sum(file_size(path) for path in folder.weights)),
        dtype=options.dtype,
        remote_code=options.trust_remote_code,
    )
    text = "shipped" if options.text is None else str(options.text)
    comparison = Comparison(
        other=str(other),
        verdict=None,
        reason="",
        same_tokens=True,
        text=text,
        text_tokens=first.perplexity.tokens,
        perplexity=first.perplexity.value(),
        other_perplexity=None,
        logits=None,
        score_difference=None,
        weights=weights,
        thresholds=THRESHOLDS,
    )
    if not folder.kind.generates:
        return _judge_scores(comparison, first, loaded)
    own = _own_tokens(first, folder, options)
    if own is not None:
        return replace(
            comparison,
            verdict="another model",
            reason="The two tokenizers split the same text differently.",
            same_tokens=False,
            other_perplexity=perplexity_of(loaded, own).value(),
        )
    perplexity, divergence = compare_with_spill(loaded, first.sequences, first.spill, heard)
    logits = divergence.result()
    verdict, reason = judge_logits(logits, weights)
    return replace(
        comparison,
        verdict=verdict,
        reason=reason,
        other_perplexity=perplexity.value(),
        logits=logits,
    )


def _compare_files(ours: Folder, theirs: Folder, heard: Heard) -> Weights | None:
    if not (ours.weights and theirs.weights):
        return None
    with Sources() as sources:
        here, there = (read_weights(side.weights, sources) for side in (ours, theirs))
        return compare_weights(here, there, sources, heard)


def _judge_scores(comparison: Comparison, first: FirstSide, loaded: Loaded) -> Comparison:
    theirs = [score(loaded, inputs)[0] for inputs in first.prompts]
    difference = score_difference(first.scores, theirs)
    verdict, reason = judge_scores(difference, comparison.weights)
    return replace(comparison, verdict=verdict, reason=reason, score_difference=difference)


def _own_tokens(first: FirstSide, folder: Folder, options: Options) -> list[Tokens] | None:
    """The text as the other's tokenizer splits it, if that differs; None if both agree.

    A folder without a tokenizer, such as a bare checkpoint, is read with the first one's.
    """
    if not folder.has_tokenizer:
        return None
    tokenizer = load_tokenizer(folder.path, remote_code=options.trust_remote_code)
    own = windows(tokenizer, first.text)
    ours = [tokens for tokens in first.sequences if tokens.text]
    prompts = all(tokenizer.encode(r) == first.encoder.tokenizer.encode(r) for r in first.rendered)
    return None if prompts and same_ids(ours, own) else own
