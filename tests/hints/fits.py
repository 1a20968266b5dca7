"""Hints of the fit: names, shapes, heads and adapters that are not the base's."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import reshard
from tests.folders import edit_weights
from tests.hints import tiny
from tests.hints.case import GOLDEN, Case, as_golden, follows, golden
from tests.hints.doctors import is_well, looking
from tests.hints.flags import with_options
from tests.hints.folders import after, converting
from tests.hints.parts import _reward

NORM = "model.norm.weight"
LAST_LAYER = "model.layers.1."
CHECK = "Check that the base is the model that was trained."
PREFIX = (
    "If the checkpoint holds several models, choose one with --prefix (for example actor.model)."
)
ALL_NAMES = "All names: reshard inspect SRC --base BASE --json."


@follows("If they were frozen and left out when it was saved, take them from the base: "
         "--fill-from-base.")  # fmt: skip
def left_out(at: Path) -> Case:
    tensors = {name: value for name, value in tiny.state().items() if name != NORM}
    run, base = tiny.zero(at / "run", tensors), tiny.model(at / "base")
    return with_options(run, at, {"base": base}, {"base": base, "fill_from_base": True})


@follows("If they were frozen and left out when it was saved, take them from the base: "
         "--fill-from-base. If the model that was trained has fewer layers, pass its own base as "
         "--base.")  # fmt: skip
def frozen_layers(at: Path) -> Case:
    """They were frozen."""
    tensors = {n: value for n, value in tiny.state().items() if not n.startswith(LAST_LAYER)}
    run, base = tiny.zero(at / "run", tensors), tiny.model(at / "base")
    case = with_options(run, at, {"base": base}, {"base": base, "fill_from_base": True})
    with pytest.raises(
        reshard.NamesError, match=r"The checkpoint lacks layer 1 of model\.layers\."
    ):
        case.cause()
    return case


@follows("If they were frozen and left out when it was saved, take them from the base: "
         "--fill-from-base. If the model that was trained has fewer layers, pass its own base as "
         "--base.")  # fmt: skip
def model_of_fewer_layers(at: Path) -> Case:
    def fewer(seed: int) -> tiny.State:
        return {n: t for n, t in tiny.state(seed).items() if not n.startswith(LAST_LAYER)}

    run, base = tiny.zero(at / "run", fewer(2)), tiny.model(at / "base")
    own = tiny.model(at / "own", tensors=fewer(1), num_hidden_layers=1)
    return with_options(run, at, {"base": base}, {"base": own})


@follows("{} What it has no place for includes biases of its modules: a model without them is "
         "another one.")  # fmt: skip
def trained_biases(at: Path) -> Case:
    def biased(seed: int) -> tiny.State:
        weights = tiny.state(seed)
        made = {n.replace("weight", "bias"): value[:, 0].contiguous()
                for n, value in weights.items() if "self_attn" in n}  # fmt: skip
        return weights | made

    run, base = tiny.zero(at / "run", biased(2)), tiny.model(at / "base")
    own = tiny.model(at / "own", tensors=biased(1), attention_bias=True)
    return with_options(run, at, {"base": base}, {"base": own})


@follows("{}{}.{}")
def left_over(at: Path) -> Case:
    """To leave out what the base has no place for."""
    run = tiny.zero(at / "run", {**tiny.state(), "probe.scale": torch.ones(3)})
    base = tiny.model(at / "base")
    return with_options(run, at, {"base": base}, {"base": base, "allow": ["probe.*"]})


@follows("{} If it is, to leave out what the base has no place for, pass {}; to take from it what "
         "the checkpoint lacks, --fill-from-base.")  # fmt: skip
def left_out_and_over(at: Path) -> Case:
    tensors = {name: value for name, value in tiny.state().items() if name != NORM}
    run = tiny.zero(at / "run", {**tensors, "probe.scale": torch.ones(3)})
    base = tiny.model(at / "base")
    options = {"base": base, "allow": ["probe.*"], "fill_from_base": True}
    return with_options(run, at, {"base": base}, options)


@follows(
    "{} In some modules of the base the checkpoint holds other tensors, as in an unknown layout: "
    "it would be wrong to leave these out, and wrong to take the base's."
)
def held_otherwise(at: Path) -> Case:
    def renamed(seed: int) -> tiny.State:
        tensors = tiny.state(seed)
        tensors["model.norm.gain"] = tensors.pop(NORM)
        return tensors

    own: dict[str, Any] = {"architectures": ["OwnForCausalLM"]}  # no class of Llama has such a norm
    run, base = tiny.zero(at / "run", renamed(2)), tiny.model(at / "base", **own)
    right = tiny.model(at / "right", tensors=renamed(1), **own)
    return with_options(run, at, {"base": base}, {"base": right})


def _other_size(at: Path, before: str, **options: Any) -> Case:
    tensors = {f"{before}{name}": value for name, value in tiny.state().items()}
    run = tiny.zero(at / "run", tensors)
    wider = {k: torch.cat([v, v]) for k, v in tiny.state(1).items()}
    other = tiny.model(at / "other", tensors={
        k: torch.cat([v, v], 1) if v.dim() > 1 else v for k, v in wider.items()})  # fmt: skip
    base = tiny.model(at / "base")
    return with_options(run, at, {"base": other, **options}, {"base": base, **options})


@follows("{} If the checkpoint holds several models, choose one with --prefix (for example "
         "actor.model). " + ALL_NAMES)  # fmt: skip
def base_of_another_size(at: Path) -> Case:
    return _other_size(at, "")


@follows(f"{CHECK} {ALL_NAMES}")
def base_of_another_size_below_a_prefix(at: Path) -> Case:
    """--prefix was passed, and is not offered."""
    case = _other_size(at, "actor.", prefix="actor")
    with pytest.raises(reshard.NamesError) as caught:
        case.cause()
    assert "--prefix" not in str(caught.value)
    return case


@follows("Pass --lora merge.")
def base_that_its_adapter_changed(at: Path) -> Case:
    run, base = tiny.saved(at / "run" / "x.pt", tiny.tuned()), tiny.model(at / "base")
    tiny.adapter_config(at / "run", init_lora_weights="pissa")
    common = {"base": base, "adapter_config": at / "run" / "adapter_config.json"}
    return with_options(run, at, {**common, "lora": "adapter"}, {**common, "lora": "merge"})


IS_IT = "Check that --base is the model that the training started from."


@follows(
    "To write the whole model, pass --lora merge; to leave them out, --allow PATTERN ..., where * "
    "is any characters."
)
@follows(f"{IS_IT} To write the whole model, pass --lora merge; to leave them out, --allow "
         "PATTERN ..., where * is any characters.")  # fmt: skip
def adapter_of_another_base(at: Path) -> Case:
    run = tiny.saved(at / "run" / "x.pt", tiny.tuned())
    common: dict[str, Any] = {"lora_alpha": 4, "lora": "adapter"}
    other, base = tiny.model(at / "other", 9), tiny.model(at / "base", 1)
    return with_options(run, at, {**common, "base": other}, {**common, "base": base})


@follows(
    "Check that --base is the model that was trained. Adapters on parameters of a module "
    "(target_parameters) are not merged."
)
def adapted_module_of_another_base(at: Path) -> Case:
    adapter = tiny.adapter(at / "adapter")
    lacking = {k: v for k, v in tiny.state(1).items() if tiny.ADAPTED not in k}
    other, base = tiny.model(at / "other", tensors=lacking), tiny.model(at / "base")
    common = {"fill_from_base": True}
    return with_options(adapter, at, {**common, "base": other}, {**common, "base": base})


@follows("Pass --dtype keep to write what the checkpoint holds.")
def no_rounding(at: Path) -> Case:
    numbers = {**tiny.state(1), NORM: torch.ones_like(tiny.state()[NORM], dtype=torch.int64)}
    run, base = tiny.zero(at / "run"), tiny.model(at / "base", tensors=numbers)
    return with_options(run, at, {"base": base}, {"base": base, "dtype": "keep"})


@follows("Leave out --base: every tensor then keeps its own name.")
def heads_for_dcp(at: Path) -> Case:
    run, base = _reward(at)
    common = {"to": "dcp"}
    return with_options(run, at, {**common, "base": base, "srm_format": "split"}, common)


@follows("If it is a critic's head of several layers, pass --value-head {}_head.")
def critics_head(at: Path) -> Case:
    width = tiny.config()["hidden_size"]
    layers = {
        "value_head.0.weight": torch.randn(4, width),
        "value_head.0.bias": torch.randn(4),
        "value_head.2.weight": torch.randn(1, 4),
        "value_head.2.bias": torch.randn(1),
    }
    run, base = tiny.saved(at / "x.pt", {**tiny.state(), **layers}), tiny.model(at / "base")
    return with_options(run, at, {"base": base}, {"base": base, "value_head": "value_head"})


@follows("Name the base model with --base: its files say what the names must be.")
def turned_experts(at: Path) -> Case:
    name = "qwen3_vl_moe"
    turned = {
        k: v.transpose(1, 2).contiguous() if v.dim() == 3 and "experts" in k else v
        for k, v in tiny.state(2, name).items()
    }
    folder = tiny.model(at / "ill", name=name, tensors=turned)
    base = tiny.model(at / "base", name=name)
    return Case(looking(folder), looking(folder, base, at / "out"), same=lambda f: bool(f.repaired))


@follows("Put the files of all ranks into one folder, with names that end in _rank0.pt, _rank1.pt "
         "and so on, and name the folder.")  # fmt: skip
def one_ranks_part(at: Path) -> Case:
    actor = GOLDEN / "ranks/no-mesh/checkpoint/global_step_7/actor"
    (at / "one").mkdir()
    shutil.copy(actor / "model_world_size_3_rank_0.pt", at / "one" / "part.pt")
    (at / "all").mkdir()
    for rank in range(3):
        shutil.copy(actor / f"model_world_size_3_rank_{rank}.pt", at / "all" / f"m_rank{rank}.pt")
    return Case(converting(at / "one" / "part.pt", at / "a"), converting(at / "all", at / "b"))


@follows("Copy the files of every rank.")
def no_optimizer_files(at: Path) -> Case:
    run = golden("zero2", at / "run")
    kept = at / "kept"
    kept.mkdir()
    for path in (run / "global_step2").glob("*optim*"):
        path.rename(kept / path.name)

    def copy() -> None:
        shutil.copytree(kept, run / "global_step2", dirs_exist_ok=True)

    return Case(
        converting(run, at / "a"), after(copy, converting(run, at / "b")), same=as_golden("zero2")
    )


@follows("Copy each rank's own file.")
def a_rank_saved_as_another(at: Path) -> Case:
    """As a script does that loads a rank's file and saves it under each rank's name."""
    run = golden("zero3", at / "run")
    one, other = sorted((run / "global_step2").glob("*optim*"))[:2]
    shutil.copy(other, at / "own")
    torch.save(torch.load(one, weights_only=False), other)
    mend = after(lambda: shutil.copy(at / "own", other), converting(run, at / "b"))
    return Case(converting(run, at / "a"), mend, same=as_golden("zero3"))


@follows("Some files of the quantised model are missing; copy it again.")
def codes_without_scales(at: Path) -> Case:
    codes = {**tiny.state(1)}
    name = f"{tiny.ADAPTED}.weight"
    codes[name] = codes[name].to(torch.float8_e4m3fn)
    scaled = {**codes, f"{name}_scale_inv": torch.ones(1, 1)}
    stated: dict[str, Any] = {
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}
    }
    ill = tiny.model(at / "ill", tensors=codes, **stated)
    copied = tiny.model(at / "copied", tensors=scaled, **stated)
    run = tiny.zero(at / "run")
    return with_options(run, at, {"base": ill}, {"base": copied})


SCALES = (
    "Convert the checkpoint that holds the scales; if they are numbers and not codes, cast them to "
    "bfloat16 with torch and save that."
)


def _codes(state: tiny.State) -> tiny.State:
    """The state dict with one weight as fp8, and the scale of its one block."""
    name = f"{tiny.ADAPTED}.weight"
    scale = state[name].abs().max() / 448
    codes = (state[name] / scale).to(torch.float8_e4m3fn)
    return {**state, name: codes, f"{name}_scale_inv": scale.reshape(1, 1)}


def _without_scales(state: tiny.State) -> tiny.State:
    return {name: value for name, value in state.items() if "scale" not in name}


def _number(codes: tiny.State) -> torch.Tensor:
    name = f"{tiny.ADAPTED}.weight"
    return codes[name].float() * codes[f"{name}_scale_inv"]


def _holds(folder: Path, expected: torch.Tensor) -> bool:
    held = reshard.open(folder).tensors[f"{tiny.ADAPTED}.weight"].numpy()
    return bool(torch.equal(torch.from_numpy(held), expected))


@follows(SCALES)
def codes_whose_scales_were_left_behind(at: Path) -> Case:
    codes = _codes(tiny.state())
    whole = tiny.saved(at / "whole.pt", codes)
    lacking = tiny.saved(at / "x.pt", _without_scales(codes))
    base = tiny.model(at / "base")
    return Case(
        converting(lacking, at / "one", base=base),
        converting(whole, at / "two", base=base),
        same=lambda report: _holds(at / "two", _number(codes)),
    )


@follows(SCALES)
def numbers_that_were_saved_as_fp8(at: Path) -> Case:
    name = f"{tiny.ADAPTED}.weight"
    small = {**tiny.state(), name: tiny.state()[name].to(torch.float8_e4m3fn)}
    run, base = tiny.saved(at / "x.pt", small), tiny.model(at / "base")
    cast = {**small, name: small[name].bfloat16()}
    return Case(
        converting(run, at / "one", base=base),
        after(lambda: tiny.saved(run, cast), converting(run, at / "two", base=base)),
        same=lambda report: _holds(at / "two", small[name].float()),
    )


ONTO_CODES = (
    "Name the unquantised model as the base, or convert a checkpoint that holds the scales."
)


@follows(ONTO_CODES)
def an_adapter_onto_codes_without_scales(at: Path) -> Case:
    adapter = tiny.adapter(at / "adapter")
    codes = _without_scales(_codes(tiny.state(1)))
    ill, base = tiny.model(at / "ill", tensors=codes), tiny.model(at / "base")
    common: dict[str, Any] = {"fill_from_base": True, "dtype": "bfloat16"}
    return with_options(adapter, at, {**common, "base": ill}, {**common, "base": base})


@follows(ONTO_CODES)
def adapters_beside_codes_without_scales(at: Path) -> Case:
    def tuned(state: tiny.State) -> tiny.State:
        named = (name.replace(tiny.ADAPTED, f"{tiny.ADAPTED}.base_layer") for name in state)
        plain = dict(
            zip((f"base_model.model.{name}" for name in named), state.values(), strict=True)
        )
        return {**plain, **tiny.adapters()}

    codes = _codes(tiny.state(1))
    lacking = tiny.saved(at / "x.pt", tuned(_without_scales(codes)))
    whole = tiny.saved(at / "whole.pt", tuned(codes))
    common: dict[str, Any] = {"base": tiny.model(at / "base"), "lora_alpha": 4}
    return Case(converting(lacking, at / "one", **common), converting(whole, at / "two", **common))


@follows("Such tensors are in: {}.")
def one_of_many_heads(at: Path) -> Case:
    width = tiny.config()["hidden_size"]
    many = {f"probe_{n}.weight": torch.randn(1, width) for n in range(12)}
    run, base = tiny.saved(at / "x.pt", {**tiny.state(), **many}), tiny.model(at / "base")
    common: dict[str, Any] = {"base": base, "allow": ["probe_*"]}
    return with_options(run, at, {**common, "value_head": "v"}, {**common, "value_head": "probe_0"})


@follows("{}. The values are not here: convert the run's checkpoint, reshard convert RUN OUT.")
def placeholders_beside_a_run_that_is_broken(at: Path) -> Case:
    folder = tiny.model(at / "run", 2)
    edit_weights(folder, lambda held: held.update({name: torch.empty(0) for name in held}))
    tag = tiny.zero(folder / "global_step1")
    (folder / "latest").write_text("global_step1")
    whole = shutil.copytree(tag, at / "whole")
    next(tag.glob("*optim*")).unlink()
    base = tiny.model(at / "base")
    again = after(converting(whole, at / "out", base=base), looking(at / "out", base))
    return Case(looking(folder), again, same=is_well)
