"""Every kind of model: the class comes from its config, and it does what transformers does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoTokenizer, LlamaForCausalLM

from reshard.evaluate.options import Sampling
from tests.evaluate import tiny
from tests.evaluate.conftest import Models
from tests.evaluate.trying import PROMPTS, attempt, names


@pytest.mark.parametrize(
    ("name", "architecture", "kind"),
    [
        ("causal", "LlamaForCausalLM", "causal language model"),
        ("causal_tied", "LlamaForCausalLM", "causal language model"),
        ("qwen_vl", "Qwen2_5_VLForConditionalGeneration", "vision-language model"),
        ("llava", "LlavaForConditionalGeneration", "vision-language model"),
        ("qwen_audio", "Qwen2AudioForConditionalGeneration", "audio-language model"),
    ],
)
def test_a_model_that_speaks_answers_every_prompt(
    models: Models, tmp_path: Path, name: str, architecture: str, kind: str
) -> None:
    report = attempt(models(name), tmp_path)
    assert report.status == "passed", (report.failures, report.findings)
    assert report.model is not None
    assert (report.model.architecture, report.model.kind) == (architecture, kind)
    assert [answer.prompt for answer in report.answers] == list(PROMPTS)
    for answer in report.answers:
        assert answer.error is None
        assert 1 <= len(answer.token_ids) <= 8
        assert answer.rendered is not None
        assert answer.rendered.endswith("<|im_start|>assistant\n")
    assert not report.scores
    assert names(report) == set()


def test_the_answer_is_that_of_transformers(models: Models, tmp_path: Path) -> None:
    folder = models("causal")
    report = attempt(folder, tmp_path)
    model = LlamaForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for answer in report.answers:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": answer.prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        expected = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        new = expected[0, inputs["input_ids"].shape[1] :]
        assert answer.token_ids == tuple(new.tolist())
        assert answer.text == tokenizer.decode(new, skip_special_tokens=True)
        assert answer.prompt_tokens == inputs["input_ids"].shape[1]


def test_raw_text_goes_in_without_the_template(models: Models, tmp_path: Path) -> None:
    report = attempt(models("causal"), tmp_path, chat=False)
    assert [answer.rendered for answer in report.answers] == list(PROMPTS)
    assert report.model is not None
    assert not report.model.chat_template


def test_an_end_token_is_told_from_the_length_limit(models: Models, tmp_path: Path) -> None:
    first = attempt(models("causal"), tmp_path)
    assert {answer.ended for answer in first.answers} == {"length"}
    # Make the first token that the model says its end token: then it stops by itself.
    folder = tiny.causal(tmp_path / "ending")
    config = transformers.GenerationConfig.from_pretrained(folder)
    config.eos_token_id = first.answers[0].token_ids[0]
    config.save_pretrained(folder)
    answer = attempt(folder, tmp_path).answers[0]
    assert (answer.ended, len(answer.token_ids)) == ("stop", 1)


@pytest.mark.parametrize("name", ["qwen_vl", "llava"])
@pytest.mark.parametrize("chat", [True, False])
def test_an_image_changes_the_answer(models: Models, tmp_path: Path, name: str, chat: bool) -> None:
    picture = tiny.image(tmp_path / "picture.png")
    plain = attempt(models(name), tmp_path, chat=chat)
    seen = attempt(models(name), tmp_path, chat=chat, images=(picture,))
    assert seen.status == "passed", seen.failures
    for one, other in zip(plain.answers, seen.answers, strict=True):
        assert one.token_ids != other.token_ids
        assert one.prompt_tokens < other.prompt_tokens


@pytest.mark.parametrize("chat", [True, False])
def test_a_sound_changes_the_answer(models: Models, tmp_path: Path, chat: bool) -> None:
    sound = tiny.tone(tmp_path / "tone.wav", rate=22050)
    plain = attempt(models("qwen_audio"), tmp_path, chat=chat)
    heard = attempt(models("qwen_audio"), tmp_path, chat=chat, audio=(sound,))
    assert heard.status == "passed", heard.failures
    for one, other in zip(plain.answers, heard.answers, strict=True):
        assert one.token_ids != other.token_ids
        assert one.prompt_tokens < other.prompt_tokens


def test_a_model_of_text_refuses_an_image(models: Models, tmp_path: Path) -> None:
    report = attempt(models("causal"), tmp_path, images=(tiny.image(tmp_path / "p.png"),))
    assert report.exit_code == 1
    assert "takes no images" in report.failures[0].message
    assert not report.answers


@pytest.mark.parametrize(
    ("name", "labels"), [("classifier", ["score"]), ("labels", ["LABEL_0", "LABEL_1", "LABEL_2"])]
)
def test_a_classifier_scores_as_transformers_does(
    models: Models, tmp_path: Path, name: str, labels: list[str]
) -> None:
    folder = models(name)
    report = attempt(folder, tmp_path)
    assert report.status == "passed", report.failures
    assert not report.answers
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for scored in report.scores:
        assert list(scored.scores) == labels
        inputs = tokenizer(scored.rendered, return_tensors="pt", add_special_tokens=False)
        with torch.no_grad():
            expected = model(**inputs).logits[0].tolist()
        assert list(scored.scores.values()) == pytest.approx(expected, abs=1e-6)


def test_sampling_follows_the_seed(models: Models, tmp_path: Path) -> None:
    def tokens(seed: int) -> list[tuple[int, ...]]:
        sampling = Sampling(do_sample=True, temperature=1.5, top_k=100)
        report = attempt(models("causal"), tmp_path, sampling=sampling, seed=seed)
        assert report.generation["do_sample"] is True
        assert report.generation["temperature"] == 1.5
        return [answer.token_ids for answer in report.answers]

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)


def test_greedy_is_the_default_whatever_the_folder_says(models: Models, tmp_path: Path) -> None:
    folder = tiny.causal(tmp_path / "sampling")
    config = transformers.GenerationConfig.from_pretrained(folder)
    config.do_sample, config.temperature = True, 5.0
    config.save_pretrained(folder)
    report = attempt(folder, tmp_path)
    assert report.generation["do_sample"] is False
    assert report.generation["temperature"] is None
    expected = attempt(models("causal"), tmp_path)
    assert [a.token_ids for a in report.answers] == [a.token_ids for a in expected.answers]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_is_the_one_asked_for(models: Models, tmp_path: Path, dtype: str) -> None:
    picture = tiny.image(tmp_path / "picture.png")
    report = attempt(models("llava"), tmp_path, dtype=dtype, images=(picture,))
    assert report.status == "passed", report.failures
    assert report.model is not None
    assert list(report.model.dtypes) == [dtype]


def test_default_prompts_are_shipped(models: Models, tmp_path: Path) -> None:
    report = attempt(models("causal"), tmp_path, prompts=())
    assert len(report.answers) == 3
    assert all(answer.prompt for answer in report.answers)
