"""The report of one run, as types: what is written to `test_results.json`.

Every field is annotated with its description, from which `schema.py` makes the JSON schema that is
shipped as `data/report.schema.json`. Times are seconds, memory is bytes. A figure that is not a
finite number is null.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from reshard.core.findings import Finding
from reshard.storage.texts import write_text

Verdict = Literal["identical", "same model, other rounding", "another model"]
Json = None | bool | int | float | str | list[Any] | dict[str, Any]


@dataclass(frozen=True, slots=True)
class Failure:
    """A part of the run that could not be done."""

    stage: Annotated[str, "What was being done."]
    error: Annotated[str, "The class of the error."]
    message: Annotated[str, "The error's own words."]
    traceback: Annotated[
        str | None, "Where it was raised, unless it is one of reshard's own errors."
    ]


@dataclass(frozen=True, slots=True)
class Environment:
    """What the run ran on."""

    reshard: Annotated[str, "Version of reshard."]
    python: Annotated[str, "Version of Python."]
    torch: Annotated[str, "Version of PyTorch."]
    transformers: Annotated[str, "Version of transformers."]
    accelerate: Annotated[str | None, "Version of accelerate; null where it is not installed."]
    platform: Annotated[str, "Operating system and processor architecture."]
    cpu_threads: Annotated[int, "Threads that PyTorch uses on the CPU."]
    gpus: Annotated[tuple[str, ...], "Names of the CUDA devices."]


@dataclass(frozen=True, slots=True)
class Model:
    """The model that was loaded."""

    kind: Annotated[str, "Which kind of model: decides the class and what is asked of it."]
    architecture: Annotated[str, "The class that was loaded."]
    model_type: Annotated[str | None, "`model_type` of config.json."]
    parameters: Annotated[int, "Number of parameters, tied ones once."]
    dtypes: Annotated[Mapping[str, int], "Number of parameters of each dtype."]
    devices: Annotated[tuple[str, ...], "Devices that hold parameters."]
    chat_template: Annotated[bool, "Whether prompts went through the chat template."]
    load_seconds: Annotated[float, "Time to load it."]
    quantisation: Annotated[
        str | None, "How config.json says that the weights are quantised; null where it does not."
    ] = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said to one prompt."""

    prompt: Annotated[str, "The prompt as given."]
    rendered: Annotated[str | None, "The text that the tokenizer got; null if it never got any."]
    text: Annotated[str | None, "The answer, special tokens left out; null if there is none."]
    prompt_tokens: Annotated[
        int, "Tokens of the prompt, placeholders of images and audio included."
    ]
    token_ids: Annotated[tuple[int, ...], "The new tokens."]
    ended: Annotated[Literal["stop", "length"] | None, "An end token, or `max_new_tokens` reached."]
    seconds: Annotated[float, "Time from the call to the last token."]
    error: Annotated[str | None, "Why there is no answer."] = None


@dataclass(frozen=True, slots=True)
class Score:
    """What a reward model or classifier gave one prompt."""

    prompt: Annotated[str, "The prompt as given."]
    rendered: Annotated[str | None, "The text that the tokenizer got; null if it never got any."]
    scores: Annotated[Mapping[str, float | None], "A number for each head or label."]
    prompt_tokens: Annotated[
        int, "Tokens of the prompt, placeholders of images and audio included."
    ]
    seconds: Annotated[float, "Time of the call."]
    error: Annotated[str | None, "Why there is no score."] = None


@dataclass(frozen=True, slots=True)
class Spread:
    """One figure over all samples."""

    median: Annotated[float, "The median."]
    minimum: Annotated[float, "The smallest."]
    maximum: Annotated[float, "The largest."]
    deviation: Annotated[float, "The standard deviation of the samples; 0 for a single one."]


@dataclass(frozen=True, slots=True)
class Sample:
    """One timed call. For a model that only scores, the figures about new tokens are null."""

    languages: Annotated[tuple[str, ...], "Languages of its prompts."]
    prompt_tokens: Annotated[int, "Tokens of all its prompts, padding left out."]
    new_tokens: Annotated[int, "New tokens of all its rows."]
    seconds: Annotated[float, "The whole call."]
    time_to_first_token: Annotated[float | None, "From the call to the first new token."]
    time_per_output_token: Annotated[float | None, "Mean time between two new tokens of one row."]
    tokens_per_second: Annotated[float | None, "New tokens of all rows over the whole call."]
    peak_cpu_bytes: Annotated[int | None, "Largest resident memory of the process during the call."]
    peak_gpu_bytes: Annotated[int | None, "Largest memory that PyTorch held on all GPUs together."]


@dataclass(frozen=True, slots=True)
class Batch:
    """All samples of one batch size."""

    batch_size: Annotated[int, "Prompts a call."]
    seconds: Annotated[Spread, "The whole call."]
    time_to_first_token: Annotated[Spread | None, "From the call to the first new token."]
    time_per_output_token: Annotated[Spread | None, "Mean time between two new tokens of one row."]
    tokens_per_second: Annotated[Spread | None, "New tokens of all rows over the whole call."]
    prompt_tokens: Annotated[Spread, "Tokens of the prompts of a call."]
    peak_cpu_bytes: Annotated[int | None, "Largest of the samples."]
    peak_gpu_bytes: Annotated[int | None, "Largest of the samples."]
    samples: Annotated[tuple[Sample, ...], "The samples, in order."]


@dataclass(frozen=True, slots=True)
class Benchmark:
    """How fast the model is. Every row makes exactly `new_tokens`: end tokens are held back."""

    new_tokens: Annotated[int, "New tokens a row."]
    warmup_calls: Annotated[int, "Calls before the first timed one of each batch size."]
    peak_cpu_source: Annotated[str | None, "Where the peak of CPU memory was read."]
    batches: Annotated[tuple[Batch, ...], "One for each batch size."]


@dataclass(frozen=True, slots=True)
class Thresholds:
    """What two models must reach to count as the same model in other rounding."""

    mean_kl: Annotated[float, "Largest mean KL divergence, in nats a token."]
    relative_difference: Annotated[float, "Largest relative difference of the logits."]
    score_difference: Annotated[float, "Largest difference of two scores."]


@dataclass(frozen=True, slots=True)
class Logits:
    """The logits of both models at the same positions of the same tokens."""

    positions: Annotated[int, "Tokens that were compared."]
    vocabulary: Annotated[tuple[int, int], "Logits a token of each; the first min() are compared."]
    max_difference: Annotated[float | None, "Largest absolute difference of two logits."]
    mean_difference: Annotated[float | None, "Mean absolute difference."]
    relative_difference: Annotated[
        float | None, "Norm of the difference over norm of the logits, each row centred first."
    ]
    mean_kl: Annotated[float | None, "Mean KL(model || other), in nats a token."]
    max_kl: Annotated[float | None, "Largest KL(model || other) of a token."]
    top1_agreement: Annotated[
        float | None, "Share of tokens where both prefer the same next token."
    ]


@dataclass(frozen=True, slots=True)
class Weights:
    """The tensors of both folders, compared element by element."""

    tensors: Annotated[int, "Tensors that both have, under the same name and in the same shape."]
    identical: Annotated[int, "Tensors whose values are all equal."]
    rounded: Annotated[
        int, "Tensors that are equal once one side is rounded to bfloat16 or float16."
    ]
    different: Annotated[int, "Tensors that differ otherwise."]
    only_here: Annotated[int, "Tensors that only the model has."]
    only_there: Annotated[int, "Tensors that only the other has."]
    examples: Annotated[tuple[str, ...], "The first names of those that differ or lack a partner."]


@dataclass(frozen=True, slots=True)
class Comparison:
    """The model against another one."""

    other: Annotated[str, "The other model's folder."]
    verdict: Annotated[Verdict | None, "What they are to each other; null if it cannot be told."]
    reason: Annotated[str, "What the verdict rests on."]
    same_tokens: Annotated[bool, "Whether both tokenizers split the texts alike."]
    text: Annotated[str, "Which text the perplexity is of."]
    text_tokens: Annotated[int, "Tokens of the text that were used."]
    perplexity: Annotated[float | None, "Perplexity of the model on the text."]
    other_perplexity: Annotated[float | None, "Perplexity of the other on the text."]
    logits: Annotated[Logits | None, "Null for models that only score, or if the tokens differ."]
    score_difference: Annotated[float | None, "Largest difference of two scores; null for others."]
    weights: Annotated[Weights | None, "Null where the two folders share no tensor name."]
    thresholds: Annotated[Thresholds, "What the verdict was held against."]


@dataclass(slots=True)
class TryReport:
    """One run; filled in as it proceeds, so that a failed run keeps its earlier results."""

    status: Annotated[
        Literal["passed", "failed", "interrupted"],
        "Passed: the model loaded, every prompt was answered, and no finding is an error.",
    ] = "failed"
    schema_version: Annotated[int, "Version of this layout."] = 1
    started: Annotated[str, "When the run began: UTC, ISO 8601."] = ""
    seconds: Annotated[float, "The whole run."] = 0.0
    model_path: Annotated[str, "The model's folder, as given."] = ""
    options: Annotated[Mapping[str, Json], "The options of the run."] = field(default_factory=dict)
    generation: Annotated[Mapping[str, Json], "The generation settings that were in force."] = (
        field(default_factory=dict)
    )
    environment: Annotated[Environment | None, "What the run ran on."] = None
    model: Annotated[Model | None, "The model; null if it did not load."] = None
    notes: Annotated[list[str], "What the run decided by itself."] = field(default_factory=list)
    answers: Annotated[list[Answer], "The answers, in the prompts' order."] = field(
        default_factory=list
    )
    scores: Annotated[list[Score], "The scores, in the prompts' order."] = field(
        default_factory=list
    )
    benchmark: Annotated[Benchmark | None, "Null unless asked for."] = None
    comparison: Annotated[Comparison | None, "Null unless asked for."] = None
    findings: Annotated[list[Finding], "The findings."] = field(default_factory=list)
    failures: Annotated[list[Failure], "What could not be done."] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0 for a run that passed, 1 for any other."""
        return 0 if self.status == "passed" else 1

    def close(self) -> None:
        """Set `status` from what was found."""
        broken = any(finding.severity == "error" for finding in self.findings)
        self.status = "failed" if broken or self.failures or self.model is None else "passed"

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        values: dict[str, Any] = plain(self)
        return values

    def write(self, path: Path) -> None:
        """Write the report to `path` at once; raises `WriteError`."""
        write_text(path, json.dumps(self.to_json(), ensure_ascii=False, indent=2) + "\n")


def finite(value: float) -> float | None:
    """`value`, or None where it is not a finite number, which JSON cannot spell."""
    return value if math.isfinite(value) else None


def plain(value: object) -> Any:
    """Dataclasses, tuples and paths as JSON values; numbers that are not finite become null."""
    if isinstance(value, Finding):
        return plain(value.to_json())
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return finite(value)
    if isinstance(value, Path):
        return str(value)
    return value
