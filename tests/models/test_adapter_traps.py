"""Adapters whose result depends on more than `W + B A s`: each right, or refused, and never silent.

loaded   the model that was trained; a converted folder computes what it computes
hint     what an error advises is done, and leads to the loaded model's numbers or another refusal
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import reshard

IDS = torch.arange(3, 15)[None]


SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
                         "num_hidden_layers": 2, "num_attention_heads": 4,
                         "num_key_value_heads": 2}  # fmt: skip


def llama(**more: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **more}))


class Run:
    """A tiny model, its base, and a run that trained what PEFT made trainable.

    `saved` is PEFT's folder, `full` the state dict of the whole model with the config beside it.
    """

    def __init__(self, at: Path, make: Callable[..., Any] = llama, **settings: Any) -> None:
        torch.manual_seed(0)
        model = make()
        self.kind, self.base = type(model), at / "base"
        model.save_pretrained(self.base)
        settings = {"r": 4, "lora_alpha": 10, "target_modules": ["q_proj", "v_proj"], **settings}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model = peft.get_peft_model(model, peft.LoraConfig(**settings))
            with torch.no_grad():
                for parameter in self.model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(torch.randn_like(parameter) / 5)
            self.model.eval()
            self.saved = at / "saved"
            self.model.save_pretrained(self.saved)
        self.full = at / "full"
        self.save(self.model.state_dict(), self.full)

    def save(self, state: dict[str, torch.Tensor], folder: Path) -> None:
        folder.mkdir()
        torch.save(state, folder / "pytorch_model.bin")
        config = (self.saved / "adapter_config.json").read_bytes()
        (folder / "adapter_config.json").write_bytes(config)

    def logits(self) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = self.model(IDS).logits
        return found

    def computed_by(self, folder: Path) -> torch.Tensor:
        model, info = self.kind.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), info
        with torch.no_grad():
            found: torch.Tensor = model.eval()(IDS).logits
        return found

    def check(self, source: Path, out: Path, **options: Any) -> reshard.Report:
        """Convert, and compare what the folder computes with the loaded model."""
        report = reshard.convert(source, out, base=self.base, **options)
        reshard.verify(out, source, base=self.base)
        torch.testing.assert_close(self.computed_by(out), self.logits(), rtol=1e-4, atol=1e-5)
        return report

    def edit(self, folder: Path, **settings: Any) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


# --- ties ---------------------------------------------------------------------------------------


def tied(**more: Any) -> Any:
    return llama(tie_word_embeddings=True, **more)


@pytest.mark.parametrize("targets", [["embed_tokens", "q_proj"], ["lm_head", "q_proj"]])
@pytest.mark.parametrize("source", ["full", "saved"])
def test_an_adapter_on_one_of_a_tied_pair(source: str, targets: list[str], tmp_path: Path) -> None:
    """The one is updated, the other is not: two tensors, and the config says so."""
    run = Run(tmp_path, tied, target_modules=targets)
    report = run.check(getattr(run, source), tmp_path / "out", fill_from_base=True)
    assert any(finding.code == "head-untied" for finding in report.findings)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False


@pytest.mark.parametrize("source", ["full", "saved"])
def test_an_adapter_on_both_of_a_tied_pair_keeps_the_tie(source: str, tmp_path: Path) -> None:
    run = Run(tmp_path, tied, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    report = run.check(getattr(run, source), tmp_path / "out", fill_from_base=True)
    assert not any(finding.code == "head-untied" for finding in report.findings)
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


def test_adapters_alone_on_a_tied_embedding(tmp_path: Path) -> None:
    """Saved without the weights that they update, as an engine saves trainable parameters."""
    run = Run(tmp_path, tied, target_modules=["embed_tokens", "q_proj"])
    state = {name: value for name, value in run.model.state_dict().items() if "lora_" in name}
    run.save(state, tmp_path / "alone")
    run.check(tmp_path / "alone", tmp_path / "out", fill_from_base=True)


# --- a vocabulary that grew ---------------------------------------------------------------------


class Grown(Run):
    """A run whose vocabulary was resized from 64 to 72 after the base was saved."""

    def __init__(self, at: Path, *, tie: bool, **settings: Any) -> None:
        def make() -> Any:
            model = llama(tie_word_embeddings=tie)
            model.save_pretrained(at / "small")
            model.resize_token_embeddings(70, pad_to_multiple_of=8)
            return model

        super().__init__(at, make, **settings)
        self.base = at / "small"


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("source", ["full", "saved"])
def test_modules_to_save_of_a_resized_vocabulary(source: str, tie: bool, tmp_path: Path) -> None:
    """PEFT saves them twice: `X.weight` and `X.modules_to_save.weight`."""
    run = Grown(tmp_path, tie=tie, modules_to_save=["embed_tokens", "lm_head"])
    run.model.config._name_or_path = str(run.base)
    run.model.peft_config["default"].base_model_name_or_path = str(run.base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.model.save_pretrained(run.saved)
    names = load_file(run.saved / "adapter_model.safetensors")
    assert any(".modules_to_save.weight" in name for name in names)
    run.check(getattr(run, source), tmp_path / "out", fill_from_base=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 72


def test_two_different_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    run = Grown(tmp_path, tie=False, modules_to_save=["embed_tokens", "lm_head"])
    state = load_file(run.saved / "adapter_model.safetensors")
    name = "base_model.model.lm_head.weight"
    state["base_model.model.lm_head.modules_to_save.weight"] = state[name] + 1
    save_file(state, run.saved / "adapter_model.safetensors")
    with pytest.raises(reshard.NamesError, match=r"two different tensors .* have this name"):
        reshard.convert(run.saved, tmp_path / "out", base=run.base, fill_from_base=True)


def test_the_bases_head_never_stands_beside_a_resized_embedding(tmp_path: Path) -> None:
    run = Grown(tmp_path, tie=False, target_modules=["embed_tokens", "q_proj"])
    state = {n: v for n, v in run.model.state_dict().items() if "lora_" in n or "embed" in n}
    run.save(state, tmp_path / "part")
    with pytest.raises(reshard.NamesError, match="72 rows, but 64 in the base") as caught:
        reshard.convert(tmp_path / "part", tmp_path / "out", base=run.base, fill_from_base=True)
    assert "holds it" in str(caught.value)
    run.check(run.full, tmp_path / "out")  # the hint: a checkpoint that holds it


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("alone", ["lm_head", "embed_tokens"])
def test_one_of_a_resized_pair_is_saved_alone(alone: str, tie: bool, tmp_path: Path) -> None:
    """Without PEFT's `save_embedding_layers`, which adds the other."""
    run = Grown(tmp_path, tie=tie, modules_to_save=[alone])
    run.model.save_pretrained(tmp_path / "alone", save_embedding_layers=False)
    for filled in (True, False):
        with pytest.raises(reshard.NamesError) as caught:
            reshard.convert(
                tmp_path / "alone", tmp_path / "out", base=run.base, fill_from_base=filled
            )
        if filled or (tie and alone == "lm_head"):
            assert re.search(r"72 rows.* 64|72, 32.*\(64, 32", str(caught.value), re.DOTALL)
            assert "hidden size" not in str(caught.value)
        else:  # what is missing, and the option that leads to the error above
            assert "take them from the base: --fill-from-base" in str(caught.value)
    run.check(run.full, tmp_path / "out")  # the hint: a checkpoint that holds it


def t5() -> Any:
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def bert() -> Any:
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)


@pytest.mark.parametrize("settings", [
    {"target_modules": ["q", "shared"]},
    {"target_modules": ["q"], "modules_to_save": ["shared"]},
    {"target_modules": ["q", "embed_tokens"]},
])  # fmt: skip
@pytest.mark.parametrize("source", ["full", "saved"])
def test_one_of_an_embeddings_names_was_trained(
    source: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """T5 holds its embedding as `shared` and in encoder and decoder; the files hold one."""
    run = Run(tmp_path, t5, **settings)
    with pytest.raises(
        (reshard.UnsupportedError, reshard.NamesError), match=r"one tensor for both|does not fit"
    ):
        reshard.convert(getattr(run, source), tmp_path / "out", base=run.base, fill_from_base=True)


@pytest.mark.parametrize("source", ["full", "saved"])
def test_an_encoders_head_stays_behind_its_embedding(source: str, tmp_path: Path) -> None:
    """BERT's predictions are tied to the embedding that was updated alone."""
    run = Run(tmp_path, bert, target_modules=["word_embeddings", "query"])
    report = reshard.convert(
        getattr(run, source), tmp_path / "out", base=run.base, fill_from_base=True
    )
    assert "head-untied" in {found.code for found in report.findings}
    found = run.kind.from_pretrained(tmp_path / "out").eval()(IDS).logits
    torch.testing.assert_close(found, run.logits(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("source", ["full", "saved"])
def test_a_tied_head_alone_is_trained(source: str, dora: bool, tmp_path: Path) -> None:
    """Every tensor that the base has is as it was; the head is another."""
    run = Run(tmp_path, tied, target_modules=["lm_head"], use_dora=dora)
    run.check(getattr(run, source), tmp_path / "out", fill_from_base=True)


def test_an_untied_head_has_the_dtype_of_what_it_was_tied_to(tmp_path: Path) -> None:
    model = tied().bfloat16()
    model.save_pretrained(tmp_path / "base")
    state = {name: value.float() for name, value in model.state_dict().items()}
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    torch.save(state, tmp_path / "x.pt")
    reshard.convert(tmp_path / "x.pt", tmp_path / "out", base=tmp_path / "base")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {value.dtype for value in written.values()} == {torch.bfloat16}
    assert torch.equal(written["lm_head.weight"], state["lm_head.weight"].bfloat16())


# --- initialisations that change the base -------------------------------------------------------


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_adapters_of_a_base_that_they_changed(init: str, tmp_path: Path) -> None:
    run = Run(tmp_path, init_lora_weights=init)
    with pytest.raises(reshard.UnsupportedError, match=f"initialised by {init}") as caught:
        reshard.convert(run.saved, tmp_path / "no", base=run.base, fill_from_base=True)
    run.check(run.full, tmp_path / "out")  # the hint: a checkpoint that holds all weights
    if init != "pissa_niter_4":  # the other hint: PEFT computes the same changed weights again
        assert "merge it with PEFT" in str(caught.value)
        again = peft.PeftModel.from_pretrained(run.kind.from_pretrained(run.base), run.saved)
        again.merge_and_unload().save_pretrained(tmp_path / "merged")
        run.check(tmp_path / "merged", tmp_path / "again")
    for mode in ("adapter", "both"):
        with pytest.raises(reshard.UnsupportedError, match="Pass --lora merge"):
            reshard.convert(run.full, tmp_path / "no", base=run.base, lora=mode)


def test_a_stated_alpha_does_not_hide_the_config(tmp_path: Path) -> None:
    """With --lora-alpha, everything but alpha is still the config's: rsLoRA, PiSSA, KaSA."""
    run = Run(tmp_path, use_rslora=True)
    run.check(run.full, tmp_path / "out", lora_alpha=10)
    run.edit(run.full, init_lora_weights="pissa", kasa_config={"beta": 1})
    with pytest.raises(reshard.UnsupportedError, match="KaSA"):
        reshard.convert(run.full, tmp_path / "no", base=run.base, lora_alpha=10)


# --- names that look like adapters --------------------------------------------------------------


def plain(at: Path, state: dict[str, torch.Tensor], **config: Any) -> Path:
    at.mkdir(parents=True)
    save_file(state, at / "model.safetensors", {"format": "pt"})
    (at / "config.json").write_text(json.dumps({"model_type": "custom", **config}))
    return at
