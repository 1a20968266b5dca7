"""The benchmark: what is counted, what is timed, what is measured."""

from __future__ import annotations

import mmap
import time
from pathlib import Path

import pytest
import torch

from reshard.evaluate import memory
from reshard.evaluate.generation import Clock, Watch
from reshard.evaluate.report import Sample
from reshard.evaluate.texts import shipped_prompts
from reshard.evaluate.timing import summarise
from reshard.transfer.memory import peak_cpu_nbytes
from tests.evaluate import tiny
from tests.evaluate.conftest import Models
from tests.evaluate.trying import attempt


def test_every_sample_of_every_batch_size(models: Models, tmp_path: Path) -> None:
    report = attempt(
        models("causal"),
        tmp_path,
        benchmark=True,
        benchmark_samples=3,
        batch_sizes=(1, 3),
        max_new_tokens=6,
    )
    assert report.status == "passed", report.failures
    found = report.benchmark
    assert found is not None
    assert (found.new_tokens, found.warmup_calls) == (6, 1)
    assert [batch.batch_size for batch in found.batches] == [1, 3]
    languages = [prompt.language for prompt in shipped_prompts()]
    for batch in found.batches:
        size = batch.batch_size
        assert len(batch.samples) == 3
        asked = [language for sample in batch.samples for language in sample.languages]
        assert asked == languages[: 3 * size]
        for sample in batch.samples:
            # End tokens are held back: every row is full.
            assert sample.new_tokens == 6 * size
            assert sample.time_to_first_token is not None
            assert sample.time_per_output_token is not None
            steps = sample.time_to_first_token + 5 * sample.time_per_output_token
            assert 0 < steps <= sample.seconds
            assert sample.tokens_per_second == pytest.approx(sample.new_tokens / sample.seconds)
            assert sample.peak_cpu_bytes is not None
            assert sample.peak_cpu_bytes > 50 << 20
        assert batch.tokens_per_second is not None


def test_prompt_tokens_leave_padding_out(models: Models, tmp_path: Path) -> None:
    report = attempt(
        models("causal"), tmp_path, benchmark=True, benchmark_samples=1, batch_sizes=(2,)
    )
    assert report.benchmark is not None
    template = len(b"<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n")
    special = len("<|im_start|>" * 2 + "<|im_end|>") - 3
    bytes_of = [len(p.text.encode()) + template - special for p in shipped_prompts()[:2]]
    assert report.benchmark.batches[0].samples[0].prompt_tokens == sum(bytes_of)


def test_a_single_token_has_no_time_between_tokens(models: Models, tmp_path: Path) -> None:
    report = attempt(
        models("causal"), tmp_path, benchmark=True, benchmark_samples=1, max_new_tokens=1
    )
    assert report.benchmark is not None
    batch = report.benchmark.batches[0]
    assert batch.time_per_output_token is None
    assert batch.time_to_first_token is not None


@pytest.mark.parametrize("name", ["classifier", "srm_vl"])
def test_models_that_score_are_timed_by_the_call(models: Models, tmp_path: Path, name: str) -> None:
    report = attempt(
        models(name), tmp_path, benchmark=True, benchmark_samples=2, batch_sizes=(1, 2)
    )
    assert report.status == "passed", report.failures
    assert report.benchmark is not None
    for batch in report.benchmark.batches:
        assert batch.time_to_first_token is None
        assert batch.tokens_per_second is None
        assert batch.seconds.median > 0


def test_images_and_sounds_go_along_in_batches(models: Models, tmp_path: Path) -> None:
    picture, sound = tiny.image(tmp_path / "p.png"), tiny.tone(tmp_path / "t.wav")
    for name, media in (("qwen_vl", {"images": (picture,)}), ("qwen_audio", {"audio": (sound,)})):
        report = attempt(
            models(name),
            tmp_path,
            benchmark=True,
            benchmark_samples=1,
            batch_sizes=(2,),
            **media,
        )
        assert report.status == "passed", report.failures


def _sample(seconds: float, tokens_per_second: float | None, peak: int | None) -> Sample:
    return Sample(("en",), 7, 4, seconds, 0.1, None, tokens_per_second, peak, None)


def test_medians_and_spread() -> None:
    batch = summarise(1, [_sample(1.0, 4.0, 10), _sample(3.0, 8.0, 30), _sample(2.0, 9.0, 20)])
    assert (batch.seconds.median, batch.seconds.minimum, batch.seconds.maximum) == (2, 1, 3)
    assert batch.seconds.deviation == pytest.approx(1.0)
    assert batch.tokens_per_second is not None
    assert batch.tokens_per_second.median == 8
    assert batch.time_per_output_token is None
    assert (batch.peak_cpu_bytes, batch.peak_gpu_bytes) == (30, None)
    assert summarise(1, [_sample(1.0, None, None)]).seconds.deviation == 0


def test_the_clock_leaves_the_prompt_out() -> None:
    heard: list[tuple[int, list[int]]] = []
    clock = Clock(lambda count, new: heard.append((count, new)))
    began = time.perf_counter()
    for value in (torch.ones(1, 9), torch.tensor([7]), torch.tensor([8])):
        clock.put(value)
    assert heard == [(1, [7]), (2, [8])]
    assert began <= clock.times[0] <= clock.times[1]


def test_the_watch_sees_nan_and_infinity_but_not_forbidden_tokens() -> None:
    watch = Watch()
    fine = torch.tensor([[0.0, -torch.inf]])
    assert torch.equal(watch(torch.ones(1, 1), fine), fine)
    assert watch.bad_steps == 0
    watch(torch.ones(1, 1), torch.tensor([[0.0, torch.nan]]))
    watch(torch.ones(1, 1), torch.tensor([[0.0, torch.inf]]))
    assert watch.bad_steps == 2


def test_the_peak_of_memory_is_that_of_the_call() -> None:
    if memory.reset_peaks() != "largest resident memory during the call":
        pytest.skip("this system cannot reset the mark of the largest resident memory")
    before = peak_cpu_nbytes()
    # Mapped anew: an allocator may hand out memory that the process already holds.
    block = mmap.mmap(-1, 64 << 20)
    for page in range(0, len(block), mmap.PAGESIZE):
        block[page] = 1
    held = peak_cpu_nbytes()
    assert before is not None
    assert held is not None
    assert held - before > 50 << 20
    block.close()
    memory.reset_peaks()
    after = peak_cpu_nbytes()
    assert after is not None
    assert held - after > 50 << 20
