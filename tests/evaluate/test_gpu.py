"""On a GPU: placement, dtype, memory and several devices. Skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from reshard.evaluate.device import place
from tests.evaluate import tiny
from tests.evaluate.conftest import Models
from tests.evaluate.trying import attempt

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("name", ["causal", "qwen_vl", "llava", "qwen_audio"])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
def test_models_answer_on_the_gpu(models: Models, tmp_path: Path, name: str, dtype: str) -> None:
    picture, sound = tiny.image(tmp_path / "p.png"), tiny.tone(tmp_path / "t.wav")
    report = attempt(
        models(name),
        tmp_path,
        device="cuda",
        dtype=dtype,
        images=(picture,) if name in ("qwen_vl", "llava") else (),
        audio=(sound,) if name == "qwen_audio" else (),
    )
    assert report.status == "passed", (report.failures, report.findings)
    assert report.model is not None
    assert report.model.devices == ("cuda:0",)
    assert report.notes == []
    assert report.environment is not None
    assert len(report.environment.gpus) == torch.cuda.device_count()


@pytest.mark.parametrize("name", ["classifier", "srm_vl", "srm_al"])
def test_scores_are_those_of_the_cpu(models: Models, tmp_path: Path, name: str) -> None:
    on_gpu = attempt(models(name), tmp_path, device="cuda")
    on_cpu = attempt(models(name), tmp_path, device="cpu")
    assert on_gpu.status == "passed", on_gpu.failures
    for one, other in zip(on_gpu.scores, on_cpu.scores, strict=True):
        assert one.scores == pytest.approx(other.scores, abs=2e-2)


def test_peak_memory_counts_the_weights(models: Models, tmp_path: Path) -> None:
    report = attempt(
        models("causal"),
        tmp_path,
        device="cuda",
        benchmark=True,
        benchmark_samples=3,
        batch_sizes=(1, 4),
    )
    assert report.benchmark is not None
    weights = (models("causal") / "model.safetensors").stat().st_size
    for batch in report.benchmark.batches:
        assert batch.peak_gpu_bytes is not None
        assert batch.peak_gpu_bytes > weights * 0.9


def test_a_model_is_identical_to_itself(models: Models, tmp_path: Path) -> None:
    report = attempt(models("causal"), tmp_path, device="cuda", compare=models("causal"))
    assert report.comparison is not None
    assert report.comparison.verdict == "identical"


def test_the_first_model_is_let_go_before_the_second_comes(tmp_path: Path) -> None:
    folder = tiny.causal(tmp_path / "large", vocab_size=400_000)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    report = attempt(folder, tmp_path, device="cuda", compare=folder, prompts=("a",))
    assert report.comparison is not None
    weights = (folder / "model.safetensors").stat().st_size
    # One model, and the logits of one window: never two models and those.
    logits = 512 * 400_000 * 4
    assert torch.cuda.max_memory_allocated() - before < 1.5 * weights + 3 * logits
    assert torch.cuda.memory_allocated() - before < 0.5 * weights


def test_a_small_model_stays_on_one_gpu() -> None:
    assert place("cuda", 1 << 20).device_map == {"": "cuda:0"}
    assert place("auto", 1 << 20).device_map == "auto"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_too_large_for_one_gpu_is_spread(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert place("cuda", 1 << 60).device_map == "auto"
    report = attempt(models("causal"), tmp_path, device="auto", compare=models("causal"))
    assert report.status == "passed", report.failures
