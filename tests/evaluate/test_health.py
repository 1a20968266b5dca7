"""The health check: each finding made, found and named; sound models have none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from reshard.core.findings import Finding
from reshard.evaluate.repetition import check_answers
from reshard.evaluate.report import Answer
from reshard.evaluate.scan import read_weights
from reshard.storage.local import Sources
from reshard.transfer import passes
from reshard.transfer.passes import Facts, scan
from tests.evaluate import tiny
from tests.evaluate.conftest import Models
from tests.evaluate.trying import attempt, named, names
from tests.folders import edit_config, edit_weights


def test_zero_constant_and_empty_tensors(copied: Models, tmp_path: Path) -> None:
    folder = copied("causal")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"].zero_()
        tensors["model.layers.1.mlp.up_proj.weight"].fill_(0.5)

    edit_weights(folder, change)
    report = attempt(folder, tmp_path)
    assert report.exit_code == 1
    zero, constant = named(report, "weights-all-zero"), named(report, "weights-constant")
    assert zero.evidence["tensors"] == {"model.layers.0.mlp.up_proj.weight": [48, 32]}
    assert constant.evidence["tensors"] == {"model.layers.1.mlp.up_proj.weight": 0.5}


def test_placeholders_of_zero3(copied: Models, tmp_path: Path) -> None:
    folder = copied("causal")
    edit_weights(folder, lambda t: t.update({"model.embed_tokens.weight": torch.empty(0)}))
    report = attempt(folder, tmp_path)
    assert named(report, "zero3-placeholders").evidence["tensors"] == {
        "model.embed_tokens.weight": [0]
    }
    assert report.exit_code == 1


def test_fresh_norms_are_no_error(models: Models, tmp_path: Path) -> None:
    finding = named(attempt(models("causal"), tmp_path), "vectors-constant")
    assert finding.severity == "info"
    assert finding.evidence["tensors"]["model.norm.weight"] == 1.0


def test_a_tokenizer_larger_than_the_embedding(copied: Models, tmp_path: Path) -> None:
    folder = copied("causal")
    tiny.tokenizer("<one>", "<two>").save_pretrained(folder)
    finding = named(attempt(folder, tmp_path), "tokenizer-too-large")
    assert finding.severity == "warning"
    assert finding.evidence == {"embedding_rows": 260, "tokenizer_tokens": 262}


def test_an_embedding_much_larger_than_the_tokenizer(tmp_path: Path) -> None:
    padded = attempt(tiny.causal(tmp_path / "padded", vocab_size=512), tmp_path)
    assert "tokenizer-too-small" not in names(padded)
    finding = named(
        attempt(tiny.causal(tmp_path / "large", vocab_size=2000), tmp_path), "tokenizer-too-small"
    )
    assert finding.severity == "warning"


def test_tied_weights_that_are_not_tied(copied: Models, tmp_path: Path) -> None:
    folder = copied("causal")
    edit_config(folder, tie_word_embeddings=True)
    report = attempt(folder, tmp_path)
    finding = named(report, "head-contradicts-config")
    tensors = load_file(folder / "model.safetensors")
    apart = (tensors["model.embed_tokens.weight"] - tensors["lm_head.weight"]).abs().max()
    assert finding.evidence["largest_difference"] == pytest.approx(float(apart))
    assert report.exit_code == 1


def test_a_tied_model_has_no_finding(models: Models, tmp_path: Path) -> None:
    assert names(attempt(models("causal_tied"), tmp_path)) == set()


def test_missing_files_are_warnings(copied: Models, tmp_path: Path) -> None:
    folder = copied("causal")
    (folder / "chat_template.jinja").unlink()
    (folder / "generation_config.json").unlink()
    report = attempt(folder, tmp_path)
    assert names(report) == {"chat-template-missing", "generation-config-missing"}
    assert report.exit_code == 0
    assert report.answers[0].rendered == report.answers[0].prompt


def test_a_missing_processor_leaves_text(copied: Models, tmp_path: Path) -> None:
    folder = copied("llava")
    (folder / "processor_config.json").unlink()
    assert names(attempt(folder, tmp_path)) == {"processor-missing"}
    report = attempt(folder, tmp_path, images=(tiny.image(tmp_path / "p.png"),))
    assert report.exit_code == 1
    assert "lacks" in report.failures[0].message


def test_a_model_that_repeats_one_token(copied: Models, tmp_path: Path) -> None:
    folder = copied("causal")

    def always_a(tensors: dict[str, torch.Tensor]) -> None:
        # Every state is normed to positive numbers and the head likes one token only.
        tensors["model.embed_tokens.weight"].abs_().add_(1)
        for name, tensor in tensors.items():
            if "o_proj" in name or "down_proj" in name:
                tensor.mul_(1e-4)
        tensors["lm_head.weight"].mul_(1e-3)[65] = 1.0

    edit_weights(folder, always_a)
    report = attempt(folder, tmp_path, max_new_tokens=24)
    finding = named(report, "generation-repeats-token")
    assert finding.severity == "error"
    assert finding.evidence["prompts"]["1"] == {"token": 65, "share": 1.0}
    assert report.exit_code == 1


def test_a_model_that_leaves_the_vocabulary(tmp_path: Path) -> None:
    folder = tiny.causal(tmp_path / "model", vocab_size=300)

    def beyond(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"].abs_().add_(1)
        tensors["lm_head.weight"].mul_(1e-3)[299] = 1.0
        for name, tensor in tensors.items():
            if "o_proj" in name or "down_proj" in name:
                tensor.mul_(1e-4)

    edit_weights(folder, beyond)
    finding = named(attempt(folder, tmp_path), "generation-outside-vocabulary")
    assert finding.evidence["tokenizer_tokens"] == 260
    assert finding.severity == "error"


def _answers(*rows: list[int]) -> list[Answer]:
    return [Answer("p", "p", "t", 1, tuple(row), "length", 1.0) for row in rows]


def _found(*rows: list[int]) -> list[Finding]:
    return check_answers(_answers(*rows), 1000)


def test_loops_and_short_answers() -> None:
    varied = list(range(40))
    assert _found(varied, [7] * 5) == []
    assert _found([]) == []
    mixed = _found(varied, [7] * 40)
    assert [(f.code, f.severity) for f in mixed] == [("answer-repeats-token", "warning")]
    loop = _found(varied + [1, 2, 3] * 20)
    assert [(f.code, f.severity) for f in loop] == [("generation-loops", "warning")]
    assert loop[0].evidence == {"tokens_in_loop": {"1": 3}}


_SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


def _looked_at(path: Path) -> Facts:
    with Sources() as sources:
        (found,) = scan(read_weights([path], sources).values(), sources, threads=1)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("facts")


@settings(max_examples=60, deadline=None)
@given(
    shape=_SHAPES,
    seed=st.integers(0, 999),
    high=st.integers(0, 2),
    bad=st.sampled_from(["", "nan", "inf", "both"]),
    nbytes=st.sampled_from([4, 8, 1 << 20]),
)
def test_facts_are_those_of_numpy(
    folder: Path, shape: tuple[int, ...], seed: int, high: int, bad: str, nbytes: int
) -> None:
    random = np.random.default_rng(seed)
    array = random.integers(0, high, size=shape, endpoint=True).astype(np.float32)
    array *= random.choice([-1, 1], size=shape if seed % 2 else ())  # zeros of both signs
    if array.size and bad in ("nan", "both"):
        array.flat[0] = np.nan
    if array.size and bad in ("inf", "both"):
        array.flat[array.size - 1] = -np.inf
    save_file({"t": torch.from_numpy(array)}, folder / "t.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "_BLOCK", nbytes)
        found = _looked_at(folder / "t.safetensors")
    assert found.special.nan == int(np.isnan(array).sum())
    assert found.special.infinite == int(np.isinf(array).sum())
    one = array.size > 1 and np.isfinite(array).all() and array.min() == array.max()
    assert found.value == (array.min() if one else None)


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.int8, torch.bool, torch.complex64]
)
def test_every_dtype_can_be_scanned(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "t.safetensors"
    save_file({"t": torch.tensor([[0.0, 1.0]]).to(dtype)}, path)
    found = _looked_at(path)
    assert not found.special
    assert found.value is None
    save_file({"t": torch.ones(2, 3).to(dtype)}, path)
    assert _looked_at(path).value == (None if dtype.is_complex else 1)
