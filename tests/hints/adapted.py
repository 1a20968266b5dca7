"""Hints about adapters and heads: settings that are rare, what engines and PEFT make of them."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file

from tests.folders import edit_config, edit_saved
from tests.hints import tiny
from tests.hints.case import Case, follows
from tests.hints.doctors import is_well, looking
from tests.hints.flags import with_options
from tests.hints.folders import _equal, after, converting, moved
from tests.hints.parts import _reward
from tests.models.test_adapter_traps import IDS, Run, llama
from tests.naming import test_titan

NORM = "model.norm.weight"


def _written(folder: Path) -> tiny.State:
    held: tiny.State = load_file(folder / "model.safetensors")
    return held


@follows("Use the merged model: the base with the adapter is another one.")
def adapter_that_lacks_what_was_trained(at: Path) -> Case:
    tensors = tiny.tuned()
    tensors[f"base_model.model.{NORM}"] += 1
    run, base = tiny.saved(at / "run" / "x.pt", tensors), tiny.model(at / "base")
    common: dict[str, Any] = {"base": base, "lora_alpha": 4}
    trained = tensors[f"base_model.model.{NORM}"]
    return Case(
        converting(run, at / "one", **common, lora="both"),
        converting(run, at / "two", **common, lora="merge"),
        same=lambda report: _equal(at / "one", {NORM: trained, **_written(at / "two")}),
    )


@follows("Check that --base is the model that the training started from. To write the whole "
         "model, pass --lora merge; to leave them out, --allow {}.")  # fmt: skip
def most_of_few_tensors_differ(at: Path) -> Case:
    few = (f"{tiny.ADAPTED}.weight", NORM, tiny.EMBEDDING)
    before = {name: tiny.state(1)[name] for name in few}
    tuned = {n: v for n, v in tiny.tuned().items() if "lora" in n or any(f[:-7] in n for f in few)}
    run = tiny.saved(at / "run" / "x.pt", tuned)
    other = tiny.model(at / "other", tensors={n: v + 1 for n, v in before.items()})
    base = tiny.model(at / "base", tensors=before)
    common: dict[str, Any] = {"lora_alpha": 4, "lora": "adapter"}
    return with_options(run, at, {**common, "base": other}, {**common, "base": base})


def _rewards_under_adapters(at: Path) -> tuple[Path, dict[str, Any]]:
    """LightRFT's reward model, whose layers PEFT replaced in place."""
    path, base = _reward(at)
    state = torch.load(path)
    module = f"model.{tiny.ADAPTED}"
    state[f"{module}.base_layer.weight"] = state.pop(f"{module}.weight")
    state |= tiny.adapters(before="model.")
    return tiny.saved(path, state), {"base": base, "model_type": "srm_vl", "lora_alpha": 4}


@follows("Pass --lora merge, or --srm-format split.")
def adapter_of_a_reward_model_merged(at: Path) -> Case:
    run, common = _rewards_under_adapters(at)
    wrong = {**common, "lora": "adapter", "srm_format": "lightrft", "allow": ["model.*"]}
    return with_options(run, at, wrong, {**common, "lora": "merge", "srm_format": "lightrft"})


@follows("Pass --lora merge, or --srm-format split.")
def adapter_of_a_reward_model_split(at: Path) -> Case:
    run, common = _rewards_under_adapters(at)
    common |= {"lora": "adapter", "allow": ["model.*"]}
    return with_options(run, at, {**common, "srm_format": "lightrft"},
                        {**common, "srm_format": "split"})  # fmt: skip


@follows("Pass --srm-format split.")
def reward_model_without_its_whole_backbone(at: Path) -> Case:
    path, base = _reward(at)
    edit_saved(path, lambda state: state.pop(f"model.{NORM}"))
    common = {"base": base, "model_type": "srm_vl", "fill_from_base": True}
    return with_options(path, at, {**common, "srm_format": "lightrft"},
                        {**common, "srm_format": "split"})  # fmt: skip


@follows("Pass --scale_for_train.")
def scale_that_is_there(at: Path) -> Case:
    path, base = _reward(at)
    edit_saved(path, lambda state: state.update({"preference_logit_scale": torch.ones(1)}))
    common = {"base": base, "model_type": "srm_vl", "srm_format": "split"}
    return with_options(path, at, {**common, "scale_for_train": False},
                        {**common, "scale_for_train": True})  # fmt: skip


@follows(
    "In config.json, set architectures to the backbone's class, or use the model only for scores."
)
def class_with_a_head_that_is_not_there(at: Path) -> Case:
    width = tiny.config()["hidden_size"]
    state = {name: value for name, value in tiny.state().items() if name != tiny.HEAD}
    heads = {"v_head.summary.weight": torch.randn(1, width), "v_head.summary.bias": torch.zeros(1)}
    run = tiny.saved(at / "x.pt", {**state, **heads})
    base = tiny.model(
        at / "base", architectures=["OwnForCausalLM"], tie_word_embeddings=False,
        auto_map={"AutoModelForCausalLM": "own.OwnForCausalLM", "AutoModel": "own.OwnModel"},
    )  # fmt: skip
    (base / "own.py").write_text("class OwnForCausalLM: ...\n\n\nclass OwnModel: ...\n")
    named = functools.partial(edit_config, at / "one", architectures=["OwnModel"])
    return Case(
        converting(run, at / "one", base=base, allow=[tiny.HEAD]),
        after(named, looking(at / "one")),
        same=is_well,
    )


@follows("Convert an earlier checkpoint of the run.")
def diverged(at: Path) -> Case:
    state = tiny.state()
    run = tiny.zero(at / "later", {**state, NORM: state[NORM] * float("nan")})
    return moved(run, tiny.zero(at / "earlier"), at)


@follows("Replace it with the modules' names, one entry each.")
def pattern_that_is_not_plain(at: Path) -> Case:
    adapter = tiny.adapter(at / "adapter", alpha_pattern={r"(.*q.*)+": 8})
    base = tiny.model(at / "base")
    named = functools.partial(tiny.adapter_config, adapter, alpha_pattern={tiny.ADAPTED: 8})
    common: dict[str, Any] = {"base": base, "fill_from_base": True}
    two = converting(adapter, at / "two", **common)
    update = 8 / 2 * _product(adapter)
    return Case(
        converting(adapter, at / "one", **common), after(named, two),
        same=lambda report: torch.allclose(
            _written(at / "two")[f"{tiny.ADAPTED}.weight"],
            tiny.state(1)[f"{tiny.ADAPTED}.weight"] + update, atol=1e-5),
    )  # fmt: skip


def _product(adapter: Path) -> torch.Tensor:
    held = load_file(adapter / "adapter_model.safetensors")
    a, b = (next(v for n, v in held.items() if f"lora_{part}" in n) for part in "AB")
    return b @ a


@follows("On other machines, change base_model_name_or_path in adapter_config.json.")
def base_that_was_moved(at: Path) -> Case:
    run = Run(at)
    moved_to = at / "elsewhere"

    def load() -> Any:
        run.base.rename(moved_to)
        run.edit(at / "out", base_model_name_or_path=str(moved_to))
        return peft.AutoPeftModelForCausalLM.from_pretrained(at / "out")(IDS).logits

    run.edit(run.full, base_model_name_or_path=None)
    return Case(
        converting(run.full, at / "out", base=run.base, lora="adapter"), load,
        same=lambda logits: torch.allclose(logits, run.logits(), atol=1e-5),
    )  # fmt: skip


@follows("Compare the output with that of PEFT.")
def setting_of_tomorrow(at: Path) -> Case:
    run = Run(at)
    run.edit(run.saved, use_tomorrow=True)

    def compare() -> Any:
        base = run.kind.from_pretrained(run.base)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = peft.PeftModel.from_pretrained(base, run.saved)
        return theirs(IDS).logits

    return Case(
        converting(run.saved, at / "out", base=run.base, fill_from_base=True), compare,
        same=lambda logits: torch.allclose(logits, run.computed_by(at / "out"), atol=1e-5),
    )  # fmt: skip


@follows("To serve it, pass --lora merge.")
def adapter_that_engines_refuse(at: Path) -> Case:
    run = Run(at, use_dora=True)
    common: dict[str, Any] = {"base": run.base}
    return with_options(
        run.full, at, {**common, "lora": "adapter"}, {**common, "lora": "merge"},
        same=lambda report: torch.allclose(run.computed_by(at / "two"), run.logits(), atol=1e-5),
    )  # fmt: skip


@follows("PEFT cannot merge it either: keep base and adapter, and load both with PEFT.")
def prompts_that_were_learned(at: Path) -> Case:
    base = llama()
    base.save_pretrained(at / "base")
    model = peft.get_peft_model(
        base, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    ).eval()
    model.save_pretrained(at / "adapter")

    def load() -> Any:
        plain = transformers.AutoModelForCausalLM.from_pretrained(at / "base")
        return peft.PeftModel.from_pretrained(plain, at / "adapter").eval()(IDS).logits

    with torch.no_grad():
        expected = model(IDS).logits
    return Case(
        converting(at / "adapter", at / "out", base=at / "base", fill_from_base=True), load,
        same=lambda logits: torch.allclose(logits, expected, atol=1e-5),
    )  # fmt: skip


@follows("Export it with torchtitan's own conversion to Hugging Face.")
def family_that_is_not_known_of_torchtitan(at: Path) -> Case:
    """What that writes is a model by the hub's names."""
    hub, theirs = test_titan.made("llama", 0)
    run = tiny.saved(at / "model.pt", theirs)
    base = test_titan.base_of(hub, at / "base", "gemma2")
    exported = tiny.saved(at / "exported" / "pytorch_model.bin", hub)
    return Case(converting(run, at / "one", base=base),
                converting(exported.parent, at / "two", base=base))  # fmt: skip
