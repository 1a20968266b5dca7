"""The comparison: figures against plain PyTorch, verdicts on models whose relation is known."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForCausalLM

from reshard.evaluate import compare, texts
from reshard.evaluate.divergence import Divergence, Perplexity, score_difference
from reshard.evaluate.report import Comparison
from reshard.evaluate.scan import read_weights
from reshard.evaluate.weights import relate
from reshard.storage.local import Sources
from tests.evaluate import tiny
from tests.evaluate.conftest import Models
from tests.evaluate.trying import attempt
from tests.folders import edit_config, edit_weights

TEXT = "The quick brown fox jumps over the lazy dog. " * 20


def compared(model: Path, other: Path, tmp_path: Path, **more: object) -> Comparison:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    report = attempt(model, tmp_path, compare=other, text=text, **more)
    assert report.status == "passed", (report.failures, report.findings)
    assert report.comparison is not None
    return report.comparison


def cast(folder: Path, dtype: torch.dtype) -> None:
    edit_weights(folder, lambda t: t.update({name: v.to(dtype) for name, v in t.items()}))
    edit_config(folder, dtype=str(dtype).removeprefix("torch."))


def test_a_model_is_identical_to_its_copy(models: Models, copied: Models, tmp_path: Path) -> None:
    found = compared(models("causal"), copied("causal"), tmp_path)
    assert found.verdict == "identical"
    assert found.logits is not None
    assert found.logits.max_difference == found.logits.mean_kl == 0
    assert found.logits.top1_agreement == 1
    assert found.weights is not None
    assert found.weights.identical == found.weights.tensors == 21
    assert found.perplexity == found.other_perplexity
    assert found.same_tokens


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_rounded_model_is_the_same_in_other_rounding(
    models: Models, copied: Models, tmp_path: Path, dtype: torch.dtype
) -> None:
    other = copied("causal")
    cast(other, dtype)
    found = compared(models("causal"), other, tmp_path)
    assert found.verdict == "same model, other rounding", found.reason
    assert found.weights is not None
    assert found.weights.different == 0
    assert found.weights.rounded > 0
    # Rounded once, and stored in float32 again: still only a rounding.
    edit_weights(other, lambda t: t.update({name: v.float() for name, v in t.items()}))
    edit_config(other, dtype="float32")
    again = compared(models("causal"), other, tmp_path)
    assert again.verdict == "same model, other rounding", again.reason


def test_another_seed_is_another_model(models: Models, tmp_path: Path) -> None:
    found = compared(models("causal"), models("other"), tmp_path)
    assert found.verdict == "another model"
    assert found.logits is not None
    assert found.logits.mean_kl is not None
    assert found.logits.mean_kl > found.thresholds.mean_kl


def _train(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        tensors[name] = tensor + 1e-5 * torch.randn_like(tensor)


def test_a_short_training_is_told_from_rounding(
    models: Models, copied: Models, tmp_path: Path
) -> None:
    other = copied("causal")
    torch.manual_seed(0)
    # As far as bfloat16 rounds, but in places that no rounding leads to.
    edit_weights(
        other, lambda t: t.update({n: v + 1e-5 * torch.randn_like(v) for n, v in t.items()})
    )
    found = compared(models("causal"), other, tmp_path)
    assert found.logits is not None
    assert found.logits.mean_kl is not None
    assert found.logits.mean_kl < found.thresholds.mean_kl
    assert found.verdict == "another model"
    assert "differ by more than rounding" in found.reason


def _hide_names(folder: Path) -> None:
    """Store the weights as torch does: then there are no tensors to compare by name."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def test_without_common_names_the_logits_decide(
    models: Models, copied: Models, tmp_path: Path
) -> None:
    other = copied("causal")
    _hide_names(other)
    same = compared(models("causal"), other, tmp_path)
    assert (same.verdict, same.weights) == ("identical", None)
    edit_config(other, dtype="bfloat16")
    close = compared(models("causal"), other, tmp_path)
    assert close.verdict == "same model, other rounding", close.reason
    shutil.copy(models("other") / "model.safetensors", other)
    _hide_names(other)
    assert compared(models("causal"), other, tmp_path).verdict == "another model"


def test_another_tokenizer_is_another_model(models: Models, copied: Models, tmp_path: Path) -> None:
    other = copied("causal")
    path = other / "tokenizer.json"
    # Two bytes change places: the same text becomes other tokens.
    raw = path.read_text().replace('"a": 64', '"a": TMP').replace('"b": 65', '"b": 64')
    changed = raw.replace('"a": TMP', '"a": 65')
    assert changed != path.read_text()
    path.write_text(changed)
    found = compared(models("causal"), other, tmp_path)
    assert (found.verdict, found.same_tokens, found.logits) == ("another model", False, None)
    assert found.other_perplexity is not None


def test_a_resized_vocabulary_is_compared_where_both_have_tokens(
    models: Models, copied: Models, tmp_path: Path
) -> None:
    other = copied("causal")

    def grow(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = torch.cat([tensors[name], torch.zeros(4, tiny.HIDDEN)])

    edit_weights(other, grow)
    edit_config(other, vocab_size=264)
    found = compared(models("causal"), other, tmp_path)
    assert found.logits is not None
    assert found.logits.vocabulary == (260, 264)
    assert found.logits.max_difference == pytest.approx(0, abs=1e-5)


def test_images_go_through_both_models(models: Models, copied: Models, tmp_path: Path) -> None:
    picture = tiny.image(tmp_path / "picture.png")
    found = compared(models("qwen_vl"), copied("qwen_vl"), tmp_path, images=(picture,))
    assert found.verdict == "identical", found.reason


def test_scores_are_compared(models: Models, copied: Models, tmp_path: Path) -> None:
    same = compared(models("srm_vl"), copied("srm_vl"), tmp_path)
    assert (same.verdict, same.score_difference) == ("identical", 0)
    assert same.logits is None
    other = copied("classifier")
    edit_weights(other, lambda t: t.update({"score.weight": -t["score.weight"]}))
    found = compared(models("classifier"), other, tmp_path)
    assert found.verdict == "another model"
    assert found.score_difference is not None
    assert found.score_difference > 0.02


def test_heads_of_a_reward_model_are_weights_too(
    models: Models, copied: Models, tmp_path: Path
) -> None:
    other = copied("srm_al")
    path = other / "reward_head.safetensors"
    tensors = load_file(path)
    tensors["preference_head.0.bias"] += 1e-5
    save_file(tensors, path)
    found = compared(models("srm_al"), other, tmp_path)
    assert found.weights is not None
    assert found.weights.examples == ("preference_head.0.bias",)
    assert found.verdict == "another model"


def test_a_folder_without_a_tokenizer_is_read_with_the_first_ones(
    models: Models, copied: Models, tmp_path: Path
) -> None:
    other = copied("causal")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (other / name).unlink()
    assert compared(models("causal"), other, tmp_path).verdict == "identical"


def test_tensors_without_a_namesake_are_named(
    models: Models, copied: Models, tmp_path: Path
) -> None:
    other = copied("causal_tied")
    edit_weights(
        other, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    )
    found = compared(models("causal_tied"), other, tmp_path)
    assert found.verdict == "identical"
    assert "1 tensors are not in the other folder" in found.reason
    assert found.weights is not None
    assert (found.weights.only_here, found.weights.only_there) == (0, 1)


def test_speaking_and_scoring_models_cannot_be_compared(models: Models, tmp_path: Path) -> None:
    report = attempt(models("causal"), tmp_path, compare=models("classifier"))
    assert report.exit_code == 1
    assert "cannot be compared" in report.failures[0].message
    # Everything before the comparison is in the report.
    assert len(report.answers) == 2


def test_another_folder_that_is_not_there(models: Models, tmp_path: Path) -> None:
    report = attempt(models("causal"), tmp_path, compare=tmp_path / "nowhere")
    assert [(f.stage, f.error) for f in report.failures] == [("compare", "NotFoundError")]


def test_perplexity_is_that_of_the_models_own_loss(models: Models, tmp_path: Path) -> None:
    found = compared(models("causal"), models("causal"), tmp_path)
    model = LlamaForCausalLM.from_pretrained(models("causal"))
    tokenizer = AutoTokenizer.from_pretrained(models("causal"))
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    windows = ids.split(compare.WINDOW, dim=1)
    with torch.no_grad():
        sums = [float(model(w, labels=w).loss) * (w.shape[1] - 1) for w in windows]
    tokens = sum(window.shape[1] - 1 for window in windows)
    assert found.text_tokens == tokens
    assert found.perplexity == pytest.approx(math.exp(sum(sums) / tokens), rel=1e-5)


def test_divergence_is_that_of_torch() -> None:
    torch.manual_seed(0)
    ours, theirs = torch.randn(100, 50), torch.randn(100, 50)
    divergence = Divergence()
    divergence.add(ours[:70], theirs[:70])
    divergence.add(ours[70:], theirs[70:])
    found = divergence.result()
    kl = torch.nn.functional.kl_div(
        theirs.log_softmax(-1), ours.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    assert found.positions == 100
    assert found.mean_kl == pytest.approx(float(kl.mean()), rel=1e-5)
    assert found.max_kl == pytest.approx(float(kl.max()), rel=1e-5)
    assert found.max_difference == pytest.approx(float((ours - theirs).abs().max()))
    assert found.mean_difference == pytest.approx(float((ours - theirs).abs().mean()), rel=1e-5)
    agreeing = (ours.argmax(-1) == theirs.argmax(-1)).double().mean()
    assert found.top1_agreement == pytest.approx(float(agreeing))


def test_a_constant_added_to_the_logits_is_no_difference() -> None:
    torch.manual_seed(0)
    ours = torch.randn(9, 30).double()
    divergence = Divergence()
    divergence.add(ours, ours + torch.arange(9)[:, None])
    found = divergence.result()
    assert found.relative_difference == pytest.approx(0, abs=1e-12)
    assert found.mean_kl == pytest.approx(0, abs=1e-12)
    assert found.max_difference == pytest.approx(8)


def test_figures_that_are_not_finite_are_none() -> None:
    divergence = Divergence()
    divergence.add(torch.full((3, 4), torch.nan), torch.zeros(3, 4))
    found = divergence.result()
    assert found.max_difference is None
    assert found.mean_kl is None
    perplexity = Perplexity()
    perplexity.add(torch.full((3, 4), torch.nan), torch.tensor([0, 1, 2]))
    assert perplexity.value() is None
    assert Perplexity().value() is None


def test_score_differences() -> None:
    assert score_difference([{"a": 1.0, "b": 2.0}], [{"a": 1.0, "b": 2.5}]) == 0.5
    assert score_difference([{"a": 1.0}], [{"b": 1.0}]) is None
    assert score_difference([{"a": math.nan}], [{"a": 1.0}]) is None


@pytest.mark.parametrize(
    ("one", "other", "relation"),
    [
        ([1.0, 2.5], [1.0, 2.5], "identical"),
        ([1.001, 2.5], [1.0, 2.5], "rounded"),
        ([1.0, 2.5], [1.01, 2.5], "different"),
        # One side rounded up, the other down: neither is the other's rounding.
        ([1.001, 2.0], [1.0, 2.001], "different"),
        ([0.0, 2.5], [-0.0, 2.5], "identical"),
    ],
)
def test_relations_of_two_tensors(
    tmp_path: Path, one: list[float], other: list[float], relation: str
) -> None:
    paths = [tmp_path / "one.safetensors", tmp_path / "other.safetensors"]
    for path, values in zip(paths, (one, other), strict=True):
        save_file({"t": torch.tensor(values)}, path)
    with Sources() as sources:
        here, there = (read_weights([path], sources)["t"] for path in paths)
        assert relate(here, there, sources) == relation
        assert relate(there, here, sources) == relation


def test_the_relation_holds_over_all_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tensor whose blocks are each a rounding, but in opposite directions, is different."""
    monkeypatch.setattr("reshard.evaluate.weights.BLOCK_NUMEL", 1)
    paths = [tmp_path / "one.safetensors", tmp_path / "other.safetensors"]
    save_file({"t": torch.tensor([[1.001], [2.0]]), "i": torch.tensor([1, 2])}, paths[0])
    save_file({"t": torch.tensor([[1.0], [2.001]]), "i": torch.tensor([1, 3])}, paths[1])
    with Sources() as sources:
        here, there = (read_weights([path], sources) for path in paths)
        assert relate(here["t"], there["t"], sources) == "different"
        assert relate(here["i"], there["i"], sources) == "different"


def test_windows_cover_the_text_up_to_the_limit() -> None:
    words = tiny.tokenizer()
    short = compare.windows(words, "x" * 600)
    assert [w.inputs["input_ids"].shape[1] for w in short] == [512, 88]
    assert all(w.text for w in short)
    long = compare.windows(words, "x" * 10000)
    assert sum(w.inputs["input_ids"].shape[1] for w in long) == compare.MOST_TOKENS


def test_shipped_texts_are_in_several_languages() -> None:
    prompts = texts.shipped_prompts()
    assert len({prompt.language for prompt in prompts}) >= 10
    assert len({prompt.text for prompt in prompts}) == len(prompts)
    assert len(texts.shipped_text().split()) > 400
