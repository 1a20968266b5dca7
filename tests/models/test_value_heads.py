"""Critics' heads of every shape that trainers save, from their state dicts to what users load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import nn
from torch.distributed import checkpoint as dcp
from transformers.models.auto import modeling_auto

import reshard
from reshard.cli.lightrft import ds2hf, fsdp2hf
from reshard.evaluate.folder import read_folder
from reshard.naming import backbone, value_heads
from tests.naming import tables
from tests.tensors import under

CONFIG = transformers.LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip
IDS = torch.arange(3, 27).reshape(2, 12)
State = dict[str, torch.Tensor]
# Types without a backbone of their own whose class is another type's; classes by other ends.
BORROWED = {"llama4", "pp_chart2table", "shieldgemma2"}
UNKNOWN_ENDS = {
    "BertGenerationDecoder", "ReformerModelWithLMHead", "DiffusionGemmaForBlockDiffusion",
    "EvollaForProteinText2Text", "IdeficsForVisionText2Text", "MarianMTModel",
    "SeamlessM4TForTextToText", "SeamlessM4Tv2ForTextToText", "EncoderDecoderModel",
    "VisionEncoderDecoderModel", "NemotronH_Omni_Reasoning_V3",
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    transformers.LlamaForCausalLM(CONFIG).save_pretrained(folder)
    return folder


def trained() -> State:
    """A language model after training: other values than the base's."""
    torch.manual_seed(1)
    return dict(transformers.LlamaForCausalLM(CONFIG).state_dict())


def head(name: str, *, bias: bool = True) -> State:
    torch.manual_seed(2)
    return {f"{name}.{part}": value for part, value in nn.Linear(32, 1, bias).state_dict().items()}


def layers(name: str) -> State:
    torch.manual_seed(3)
    mlp = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 1))
    return {f"{name}.{part}": value for part, value in mlp.state_dict().items()}


# What each trainer saves, and what names its head where it is not found without a name.
SAVED = {
    "trl": ({**trained(), **head("v_head.summary")}, None),
    "trl, ZeRO-3": ({**under("pretrained_model.", trained()), **head("v_head.summary")}, None),
    "nested": (under("model.", {**trained(), **head("v_head.summary")}), None),
    "named in full": ({**trained(), **head("value.out")}, "value.out.weight"),
    "named above": ({**trained(), **head("value.out")}, "value"),
    "named below": ({**trained(), **head("v_head.summary")}, "v_head.summary"),
    "several layers": ({**trained(), **layers("value_head")}, "value_head"),
    "without a bias": ({**trained(), **head("value_head", bias=False)}, "value_head"),
    "unknown prefix": (
        {**under("policy_net.", trained()), **head("v_head.summary")}, None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SAVED)
def test_a_head_beside_a_policy_is_a_file_beside_the_model(
    base: Path, kind: str, tmp_path: Path
) -> None:
    state, named = SAVED[kind]
    torch.save(state, tmp_path / "run.pt")
    out = tmp_path / "out"
    reshard.convert(tmp_path / "run.pt", out, base=base, value_head=named)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    for name, value in trained().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    heads = load_file(out / "value_head.safetensors")
    expected = {n: v for n, v in state.items() if n.removeprefix("model.").startswith("v")}
    assert heads.keys() == {name.removeprefix("model.") for name in expected}
    for name, value in expected.items():
        assert torch.equal(heads[name.removeprefix("model.")], value)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    model = load_file(out / "model.safetensors")
    assert index["weight_map"] == dict.fromkeys(model, "model.safetensors")
    reshard.verify(out, tmp_path / "run.pt")
    assert reshard.diff(tmp_path / "run.pt", out).same


def test_trls_own_module_loads_the_file(base: Path, tmp_path: Path) -> None:
    """TRL's value head, as its source has it: dropout and a linear layer called `summary`."""

    class ValueHead(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Dropout(0.1)
            self.summary = nn.Linear(32, 1)

    module = nn.Module()
    module.pretrained_model = transformers.LlamaForCausalLM(CONFIG)
    module.v_head = ValueHead()
    torch.save(module.state_dict(), tmp_path / "run.pt")
    reshard.convert(tmp_path / "run.pt", tmp_path / "out", base=base)
    again = nn.Module()
    again.v_head = ValueHead()
    again.load_state_dict(load_file(tmp_path / "out" / "value_head.safetensors"), strict=True)
    assert torch.equal(again.v_head.summary.weight, module.v_head.summary.weight)


@pytest.mark.parametrize("task", ["Sequence", "Token"])
def test_a_head_on_the_backbone_alone_is_a_classifier(
    base: Path, task: str, tmp_path: Path
) -> None:
    torch.manual_seed(4)
    config = transformers.LlamaConfig(**{**CONFIG.to_dict(), "num_labels": 1, "pad_token_id": 0})
    critic: Any = getattr(transformers, f"LlamaFor{task}Classification")(config).eval()
    dcp.save({"model": critic.state_dict()}, checkpoint_id=tmp_path / "run", no_dist=True)
    out = tmp_path / "out"
    arguments = ["--hf_base", base, "--checkpoint_dir", tmp_path / "run", "--output_dir", out]
    done = CliRunner().invoke(fsdp2hf.command, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    stated = json.loads((out / "config.json").read_text())
    assert stated["architectures"] == [f"LlamaFor{task}Classification"]
    auto: Any = getattr(transformers, f"AutoModelFor{task}Classification")
    loaded, info = auto.from_pretrained(out, output_loading_info=True, pad_token_id=0)
    assert not any(info.values())
    with torch.no_grad():
        logits = loaded.eval()(IDS).logits
        torch.testing.assert_close(logits, critic(IDS).logits, rtol=0, atol=0)
    reshard.verify(out, tmp_path / "run")
    assert not reshard.doctor(out, base=base).errors


def test_a_backbone_with_a_head_of_several_layers(base: Path, tmp_path: Path) -> None:
    """No class holds such a head, and none may claim the output head that was left out."""
    state = {name: value for name, value in trained().items() if name != "lm_head.weight"}
    torch.save({**state, **layers("value_head")}, tmp_path / "run.pt")
    out = tmp_path / "out"
    with pytest.raises(reshard.NamesError, match=r"lm_head\.weight"):
        reshard.convert(tmp_path / "run.pt", out, base=base, value_head="value_head")
    report = reshard.convert(
        tmp_path / "run.pt", out, base=base, value_head="value_head", allow=["lm_head.weight"]
    )
    assert "no-output-head" in {found.code for found in report.findings}
    assert json.loads((out / "config.json").read_text())["architectures"] == ["LlamaModel"]
    assert json.loads((out / "reshard.json").read_text())["generates"] is False
    loaded, info = transformers.AutoModel.from_pretrained(out, output_loading_info=True)
    assert type(loaded).__name__ == "LlamaModel"
    assert not any(info.values())
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, state[f"model.{name}"])
    reshard.verify(out, tmp_path / "run.pt", base=base)
    assert not reshard.doctor(out, base=base).errors
    with pytest.raises(reshard.UnsupportedError, match=r"scores come from value_head"):
        read_folder(out)


def test_weights_in_a_sub_folder_need_no_index(base: Path, tmp_path: Path) -> None:
    state = under("base_model.model.", trained())
    lora = {"lora_A": torch.ones(2, 32), "lora_B": torch.ones(32, 2)}
    inside = "base_model.model.model.layers.0.self_attn.q_proj"
    state[f"{inside}.base_layer.weight"] = state.pop(f"{inside}.weight")
    state.update({f"{inside}.{part}.default.weight": value for part, value in lora.items()})
    torch.save(state, tmp_path / "run.pt")
    out = tmp_path / "out"
    reshard.convert(tmp_path / "run.pt", out, base=base, lora="both", lora_alpha=2)
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
    assert not (out / "model.safetensors.index.json").exists()


def test_the_class_of_each_backbone_is_transformers_own() -> None:
    """The class that AutoModel takes for the config, by the class of the model with a head."""
    unknown = set()
    for table in (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    ):
        for kind, headed in table.items():
            bare = modeling_auto.MODEL_MAPPING_NAMES.get(kind)
            known = (bare,) if isinstance(bare, str) else bare or ()
            for named in (headed,) if isinstance(headed, str) else headed:
                found = backbone.class_without_head({"architectures": [named], "model_type": kind})
                if found is None:
                    unknown.add(named)
                elif kind not in BORROWED:
                    assert found in known, (kind, named)
    assert unknown <= {*backbone.ALONE, *UNKNOWN_ENDS}


def test_every_class_that_a_critic_becomes_is_one_of_transformers() -> None:
    """And it is the one that transformers itself takes for the config of the causal model."""
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    for names, parts, known in (
        (value_heads.SEQUENCE_CLASSIFIERS, {"weight"},
         modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
        (value_heads.TOKEN_CLASSIFIERS, {"weight", "bias"},
         modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES),
    ):  # fmt: skip
        found = value_heads.ValueHead("score", {p: tables.entry(p, (1, 8)) for p in parts})
        for name in sorted(names):
            patches = value_heads.classifier(found, [f"{name}ForCausalLM"], speaks=False)
            assert patches is not None
            kinds = [kind for kind, of in causal.items() if of == f"{name}ForCausalLM"]
            assert patches["architectures"] in [[known.get(kind)] for kind in kinds], name


def test_a_causal_model_without_a_classifier_keeps_its_class() -> None:
    found = value_heads.ValueHead("score", {})
    assert value_heads.classifier(found, ["GPT2LMHeadModel"], speaks=False) is None
    assert value_heads.classifier(found, ["CodeGenForCausalLM"], speaks=False) is None
    assert value_heads.classifier(found, [], speaks=False) is None


@pytest.mark.parametrize("prefix", ["", "pretrained_model.", "actor.model."])
@pytest.mark.parametrize("pattern", ["v_head.*", "*v_head*"])
def test_a_head_is_left_out_behind_any_prefix(
    base: Path, prefix: str, pattern: str, tmp_path: Path
) -> None:
    torch.save({**under(prefix, trained()), **head("v_head.summary")}, tmp_path / "run.pt")
    report = reshard.convert(tmp_path / "run.pt", tmp_path / "out", base=base, allow=[pattern])
    assert set(report.unexpected) == {"v_head.summary.weight", "v_head.summary.bias"}
    assert not (tmp_path / "out" / "value_head.safetensors").exists()
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[name], value) for name, value in trained().items())


def test_what_lies_under_the_prefix_is_left_out_by_its_name_without_it(
    base: Path, tmp_path: Path
) -> None:
    state = {**trained(), "extra.weight": torch.ones(3, 3)}
    torch.save(under("actor.", state), tmp_path / "run.pt")
    for number, pattern in enumerate(("extra.*", "actor.extra.*")):
        out = tmp_path / f"out{number}"
        report = reshard.convert(tmp_path / "run.pt", out, base=base, allow=[pattern])
        assert report.unexpected == ("actor.extra.weight",)


def test_the_hints_of_an_unknown_head_lead_to_both_results(base: Path, tmp_path: Path) -> None:
    torch.save({**trained(), **head("my_head")}, tmp_path / "run.pt")
    with pytest.raises(reshard.NamesError) as caught:
        reshard.convert(tmp_path / "run.pt", tmp_path / "out", base=base)
    assert "--allow 'my_head.*'" in str(caught.value)
    assert "--value-head my_head" in str(caught.value)
    reshard.convert(tmp_path / "run.pt", tmp_path / "a", base=base, allow=["my_head.*"])
    reshard.convert(tmp_path / "run.pt", tmp_path / "b", base=base, value_head="my_head")
    heads = load_file(tmp_path / "b" / "value_head.safetensors")
    assert torch.equal(heads["my_head.bias"], head("my_head")["my_head.bias"])


def test_a_name_that_is_no_head_says_which_is(base: Path, tmp_path: Path) -> None:
    torch.save({**trained(), **head("v_head.summary")}, tmp_path / "run.pt")
    with pytest.raises(reshard.NamesError, match=r"no value head 'lm_head'.*in: v_head\.summary\."):
        reshard.convert(tmp_path / "run.pt", tmp_path / "out", base=base, value_head="lm_head")
    reshard.convert(tmp_path / "run.pt", tmp_path / "out", base=base, value_head="v_head.summary")


def test_the_scripts_take_a_value_head(base: Path, tmp_path: Path) -> None:
    state = {**trained(), **head("value_head", bias=False)}
    torch.save(state, tmp_path / "pytorch_model.bin")
    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    for command, source in ((ds2hf.command, "pytorch_model.bin"), (fsdp2hf.command, "dcp")):
        out = tmp_path / f"out-{source}"
        arguments = ["--hf_base", base, "--checkpoint_dir", tmp_path / source, "--output_dir", out,
                     "--value_head", "value_head"]  # fmt: skip
        done = CliRunner().invoke(command, list(map(str, arguments)), catch_exceptions=False)
        assert done.exit_code == 0, done.output
        written = load_file(out / "value_head.safetensors")
        assert torch.equal(written["value_head.weight"], state["value_head.weight"])
