"""The benchmark: the same number of new tokens in every call, timed at each token's arrival.

For every batch size one warm-up call, then the samples. End tokens are held back, so that every
row makes exactly `max_new_tokens` and the spread shows the machine, not the answers' lengths. A
token's time is when it reached the CPU, so a GPU's queue is not mistaken for its work.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from reshard.evaluate.encoding import Encoder, Inputs, Media
from reshard.evaluate.generation import generate
from reshard.evaluate.loading import Loaded
from reshard.evaluate.memory import peak_gpu_nbytes, reset_peaks
from reshard.evaluate.report import Batch, Benchmark, Sample, Spread
from reshard.evaluate.scoring import score
from reshard.evaluate.texts import Prompt
from reshard.transfer.memory import peak_cpu_nbytes

WARMUP_CALLS = 1
# A warm-up needs no more: kernels are chosen and memory is taken within the first few steps.
_WARMUP_TOKENS = 16


def benchmark(
    loaded: Loaded,
    encoder: Encoder,
    prompts: Sequence[Prompt],
    media: Media,
    arguments: Mapping[str, Any],
    *,
    samples: int,
    batch_sizes: Sequence[int],
    on_sample: Callable[[int, int], None] | None = None,
) -> Benchmark:
    """Time `samples` calls for each batch size; `on_sample` hears how many of how many are done.

    Sample i takes the next `batch_size` prompts, starting again from the first when they run out.
    """
    total, done = samples * len(batch_sizes), 0
    source = reset_peaks()
    batches: list[Batch] = []
    for size in batch_sizes:
        for _ in range(WARMUP_CALLS):
            chosen = _choose(prompts, 0, size)
            _time(loaded, encoder, chosen, media, _shortened(arguments))
        timed: list[Sample] = []
        for index in range(samples):
            chosen = _choose(prompts, index * size, size)
            timed.append(_time(loaded, encoder, chosen, media, arguments))
            done += 1
            if on_sample is not None:
                on_sample(done, total)
        batches.append(summarise(size, timed))
    tokens = int(arguments["max_new_tokens"]) if loaded.folder.kind.generates else 0
    return Benchmark(tokens, WARMUP_CALLS, source, tuple(batches))


def summarise(batch_size: int, samples: Sequence[Sample]) -> Batch:
    """Median and spread of every figure."""

    def known(name: str) -> list[Any]:
        return [value for sample in samples if (value := getattr(sample, name)) is not None]

    def spread(name: str) -> Spread | None:
        values = known(name)
        return _spread(values) if values else None

    return Batch(
        batch_size=batch_size,
        seconds=_spread([sample.seconds for sample in samples]),
        time_to_first_token=spread("time_to_first_token"),
        time_per_output_token=spread("time_per_output_token"),
        tokens_per_second=spread("tokens_per_second"),
        prompt_tokens=_spread([float(sample.prompt_tokens) for sample in samples]),
        peak_cpu_bytes=max(known("peak_cpu_bytes"), default=None),
        peak_gpu_bytes=max(known("peak_gpu_bytes"), default=None),
        samples=tuple(samples),
    )


def _spread(values: Sequence[float]) -> Spread:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return Spread(statistics.median(values), min(values), max(values), deviation)


def _choose(prompts: Sequence[Prompt], start: int, count: int) -> list[Prompt]:
    return [prompts[(start + index) % len(prompts)] for index in range(count)]


def _shortened(arguments: Mapping[str, Any]) -> dict[str, Any]:
    tokens = min(int(arguments["max_new_tokens"]), _WARMUP_TOKENS)
    return {**arguments, "max_new_tokens": tokens}


def _time(
    loaded: Loaded,
    encoder: Encoder,
    prompts: Sequence[Prompt],
    media: Media,
    arguments: Mapping[str, Any],
) -> Sample:
    inputs = encoder.encode([encoder.render(prompt.text, media) for prompt in prompts], media)
    languages = tuple(prompt.language for prompt in prompts)
    reset_peaks()
    if loaded.folder.kind.generates:
        return _time_generation(loaded, inputs, languages, arguments)
    began = time.perf_counter()
    score(loaded, inputs)
    seconds = time.perf_counter() - began
    return _sample(languages, inputs, 0, seconds, None, None)


def _time_generation(
    loaded: Loaded, inputs: Inputs, languages: tuple[str, ...], arguments: Mapping[str, Any]
) -> Sample:
    forced = {**arguments, "min_new_tokens": arguments["max_new_tokens"]}
    made = generate(loaded, inputs, forced, watched=False)
    first = made.times[0] - made.began
    steps = len(made.times) - 1
    each = (made.times[-1] - made.times[0]) / steps if steps else None
    return _sample(languages, inputs, sum(map(len, made.rows)), made.seconds, first, each)


def _sample(
    languages: tuple[str, ...],
    inputs: Inputs,
    new_tokens: int,
    seconds: float,
    first: float | None,
    each: float | None,
) -> Sample:
    return Sample(
        languages=languages,
        prompt_tokens=int(inputs["attention_mask"].sum()),
        new_tokens=new_tokens,
        seconds=seconds,
        time_to_first_token=first,
        time_per_output_token=each,
        tokens_per_second=new_tokens / seconds if new_tokens else None,
        peak_cpu_bytes=peak_cpu_nbytes(),
        peak_gpu_bytes=peak_gpu_nbytes(),
    )
