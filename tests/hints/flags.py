"""Hints that name an option to pass, to leave out or to correct: the same call with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import reshard
from tests.hints import tiny
from tests.hints.case import GOLDEN, Case, as_golden, follows, golden


def with_options(
    source: Path, at: Path, wrong: dict[str, Any], right: dict[str, Any], **more: Any
) -> Case:
    """A conversion with some options that fails, and one with others."""

    def convert(name: str, options: dict[str, Any]) -> Callable[[], object]:
        return lambda: reshard.convert(source, at / name, **options)

    return Case(convert("one", wrong), convert("two", right), **more)


@follows("Pass --base.")
def base_for_its_dtype(at: Path) -> Case:
    base, run = tiny.model(at / "base"), tiny.zero(at / "run")
    return with_options(run, at, {"dtype": "base"}, {"dtype": "base", "base": base})


@follows("To complete it: {}")
def completing(at: Path) -> Case:
    """The command that the report offers, run."""
    import shlex

    base, run = tiny.model(at / "base"), tiny.zero(at / "run")

    def offered() -> object:
        from reshard.cli.app import reshard as command
        from reshard.cli.app import run as cli

        report = reshard.convert(run, at / "again", to="hf")
        (fix,) = (f.fix for f in report.findings if f.fix.startswith("To complete it: "))
        words = shlex.split(fix.removeprefix("To complete it: ").replace("MODEL", str(base)))
        assert cli(command, words[1:]) == 0, fix
        return reshard.doctor(at / "again")

    return Case(
        lambda: reshard.convert(run, at / "out", to="hf"),
        offered,
        same=lambda found: not {f.code for f in found.errors} - {"tokenizer-missing"},
    )


@follows("Pass --to dcp, or leave out --names.")
def names_all(at: Path) -> Case:
    source = tiny.model(at / "model")
    return with_options(source, at, {"to": "hf", "names": "all"}, {"to": "dcp", "names": "all"})


@follows("Pass --to dcp, or leave out --names.")
def without_names(at: Path) -> Case:
    return with_options(tiny.model(at / "model"), at, {"to": "hf", "names": "all"}, {"to": "hf"})


@follows("Pass --to dcp, or leave out --consumed-samples.")
def consumed(at: Path) -> Case:
    options = {"to": "hf", "consumed_samples": 3}
    return with_options(tiny.model(at / "model"), at, options, {**options, "to": "dcp"})


@follows("Pass --against.")
def against(at: Path) -> Case:
    run = tiny.zero(at / "deep" / "run")
    reshard.convert(run, at / "out")
    return Case(
        lambda: reshard.verify(at / "out", tag="run"),
        lambda: reshard.verify(at / "out", tag="run", against=run),
        same=lambda found: found.num_tensors == len(tiny.state()),
    )


@follows("If that is what you expect, pass --allow-unchanged.")
def unchanged(at: Path) -> Case:
    base, run = tiny.model(at / "base"), tiny.zero(at / "run", tiny.state(1))
    return with_options(run, at, {"base": base}, {"base": base, "allow_unchanged": True})


@follows("Name the one to read with --prefix.")
def parts_of_a_file(at: Path) -> Case:
    run = tiny.saved(at / "x.pt", {"policy": tiny.state(2), "teacher": tiny.state(3)})
    base = tiny.model(at / "base")
    return with_options(run, at, {"base": base}, {"base": base, "prefix": "policy"})


@follows("Name the one to read: {}.")
def models_under_prefixes(at: Path) -> Case:
    two = {f"{part}.{k}": v for part in ("student", "teacher") for k, v in tiny.state().items()}
    run, base = tiny.saved(at / "x.pt", two), tiny.model(at / "base")
    return with_options(run, at, {"base": base}, {"base": base, "prefix": "teacher"})


def _with_and_without_a_prefix(at: Path, **right: Any) -> Case:
    """`--allow '*'` would leave either of two models."""
    two = {f"actor.{name}": value for name, value in tiny.state(3).items()} | tiny.state(2)
    run = tiny.saved(at / "x.pt", {**two, "actor.step": torch.ones(3)})
    base = tiny.model(at / "base")
    return with_options(run, at, {"base": base, "allow": ["*"]}, {"base": base, **right})


_EITHER = "Name the one to read: {}. For the one without a prefix, pass only --allow {}."


@follows(_EITHER)
def model_without_a_prefix(at: Path) -> Case:
    return _with_and_without_a_prefix(at, allow=["actor.*"])


@follows(_EITHER)
def model_with_a_prefix(at: Path) -> Case:
    return _with_and_without_a_prefix(at, allow=["*"], prefix="actor")


@follows("Correct --prefix, or leave it out.")
def wrong_prefix(at: Path) -> Case:
    run, base = tiny.zero(at / "run"), tiny.model(at / "base")
    return with_options(run, at, {"base": base, "prefix": "actor"}, {"base": base})


@follows("Pass --model-type {}.")
def model_type(at: Path) -> Case:
    run, base = tiny.zero(at / "run"), tiny.model(at / "base")
    wrong = {"base": base, "model_type": "srm_vl"}
    return with_options(run, at, wrong, {"base": base, "model_type": "grm"})


@follows("Leave out --pooling_method, --scale_for_train and --heads_types.")
def no_heads(at: Path) -> Case:
    run, base = tiny.zero(at / "run"), tiny.model(at / "base")
    return with_options(run, at, {"base": base, "pooling_method": "last"}, {"base": base})


@follows("Correct the pattern, or leave it out.")
def unmatched(at: Path) -> Case:
    tensors = {**tiny.state(), "extra.weight": torch.ones(3)}
    run, base = tiny.saved(at / "x.pt", tensors), tiny.model(at / "base")
    common = {"base": base}
    return with_options(
        run, at, {**common, "allow": ["extra.*", "extar.*"]}, {**common, "allow": ["extra.*"]}
    )


@follows("Did you mean {}?")
def misspelt_code(at: Path) -> Case:
    run, base = tiny.zero(at / "run"), tiny.model(at / "base")
    return with_options(
        run, at, {"base": base, "strict": ["unchangd"]}, {"base": base, "strict": ["unchanged"]}
    )


@follows("docs/findings.md lists all codes.")
def no_code(at: Path) -> Case:
    run, base = tiny.zero(at / "run"), tiny.model(at / "base")
    return with_options(
        run, at, {"base": base, "strict": ["zzzzz"]}, {"base": base, "strict": ["rounded"]}
    )


@follows("Write it like 5GB or 500MB.")
def size_without_a_unit(at: Path) -> Case:
    run = tiny.zero(at / "run")
    return with_options(run, at, {"max_shard_size": "5 lots"}, {"max_shard_size": "5GB"})


@follows("Write it as in 4.57.1 or 5.23.")
def version_in_words(at: Path) -> Case:
    source = tiny.model(at / "model")
    common = {"to": "dcp", "names": "memory"}
    return with_options(
        source, at, {**common, "transformers_version": "new"},
        {**common, "transformers_version": "4.57.1"},
    )  # fmt: skip


@follows("Pass --dtype keep, or a dtype of wider range.")
def out_of_range(at: Path) -> Case:
    tensors = tiny.state()
    tensors["model.norm.weight"][0] = 1e6
    run, base = tiny.zero(at / "run", tensors), tiny.model(at / "base")
    return with_options(
        run, at, {"base": base, "dtype": "float16"}, {"base": base, "dtype": "keep"}
    )


@follows("Leave out --role.")
def no_role(at: Path) -> Case:
    run = golden("zero2", at / "run")
    return with_options(run, at, {"role": "actor"}, {}, same=as_golden("zero2"))


@follows("Leave out --role, or name the folder above.")
def another_role(at: Path) -> Case:
    run = GOLDEN / "ranks/no-mesh/checkpoint/global_step_7/actor"
    return with_options(run, at, {"role": "critic"}, {})


@follows("Leave out --tag, or name the folder above.")
def no_tag(at: Path) -> Case:
    run = golden("dcp", at / "run")
    return with_options(run, at, {"tag": "global_step1"}, {}, same=as_golden("dcp"))


@follows("Name the folder above it: {}.")
def tag_of_another(at: Path) -> Case:
    run = golden("zero2", at / "run")
    return Case(
        lambda: reshard.convert(run / "global_step2", at / "out", tag="global_step1"),
        lambda: reshard.convert(run, at / "out", tag="global_step1"),
        refused=reshard.NotFoundError,  # which lists the tags that are there
    )


@follows("Pass --tag.")
def latest_is_empty(at: Path) -> Case:
    run = golden("zero2", at / "run")
    (run / "latest").write_text("")
    return with_options(run, at, {}, {"tag": "global_step2"}, same=as_golden("zero2"))


@follows("The existing tags: {}.")
def no_such_tag(at: Path) -> Case:
    run = golden("zero2", at / "run")
    return with_options(run, at, {"tag": ".."}, {"tag": "global_step2"}, same=as_golden("zero2"))


@follows(
    "Copy all files of one save. If the optimizer was restarted on purpose, pass "
    "--allow-step-mismatch."
)
def restarted(at: Path) -> Case:
    run = tiny.zero(at / "run")
    for path in run.glob("*model_states.pt"):
        content = torch.load(path, weights_only=False)
        torch.save({**content, "global_steps": 7}, path)
    return with_options(run, at, {}, {"allow_step_mismatch": True})


@follows("Name one of them with --tag.")
def several_tags(at: Path) -> Case:
    run = golden("zero2", at / "run")
    golden("zero2", at / "other")
    (at / "other" / "global_step2").rename(run / "global_step1")
    (run / "latest").unlink()
    return with_options(run, at, {}, {"tag": "global_step2"}, same=as_golden("zero2"))


@follows("Such tensors are in: {}.")
def another_value_head(at: Path) -> Case:
    width = tiny.config()["hidden_size"]
    tensors = {**tiny.state(), "critic_out.weight": torch.randn(1, width)}
    run, base = tiny.saved(at / "x.pt", tensors), tiny.model(at / "base")
    common: dict[str, Any] = {"base": base}
    return with_options(
        run, at, {**common, "value_head": "v"}, {**common, "value_head": "critic_out"}
    )


@follows("There is none; leave it out.")
def no_value_head(at: Path) -> Case:
    run, base = tiny.zero(at / "run"), tiny.model(at / "base")
    return with_options(run, at, {"base": base, "value_head": "v_head"}, {"base": base})


@follows(
    "If the head was frozen, take it from the base by its name: --allow {} together with "
    "--fill-from-base."
)
def head_of_the_base(at: Path) -> Case:
    tensors = {k: v for k, v in tiny.state().items() if k != tiny.HEAD}
    run, base = tiny.zero(at / "run", tensors), tiny.model(at / "base", tie_word_embeddings=False)
    common: dict[str, Any] = {"base": base, "fill_from_base": True}
    return with_options(run, at, common, {**common, "allow": [tiny.HEAD]})


@follows("Convert a checkpoint of the run that holds it.")
def resized_without_its_head(at: Path) -> Case:
    """The embedding grew, the head is not there: only another checkpoint has it."""
    whole = tiny.state()
    for name in (tiny.HEAD, tiny.EMBEDDING):
        whole[name] = torch.cat([whole[name], whole[name][:8]])
    part = {k: v for k, v in whole.items() if k != tiny.HEAD}
    base = tiny.model(at / "base", tie_word_embeddings=False)
    lacking, run = tiny.zero(at / "lacking", part), tiny.zero(at / "whole", whole)
    return Case(
        lambda: reshard.convert(lacking, at / "a", base=base, fill_from_base=True),
        lambda: reshard.convert(run, at / "b", base=base, fill_from_base=True),
    )


@follows("Pass --base, the base of the conversion.")
@follows(
    "Pass --base, the base of the conversion. Without it, the names must be those of the "
    "checkpoint; reshard diff lists the others."
)
def base_to_verify(at: Path) -> Case:
    base = tiny.model(at / "base", name="qwen2_5_vl")
    run = tiny.zero(at / "run", tiny.state(2, "qwen2_5_vl"))
    out = at / "out"
    reshard.convert(run, out, base=base, to="dcp", names="disk")
    renamed = {f"actor.model.{k}": v for k, v in tiny.state(2, "qwen2_5_vl").items()}
    other = tiny.zero(at / "renamed", renamed)
    return Case(
        lambda: reshard.verify(out, against=other),
        lambda: reshard.verify(out, against=other, base=base),
        same=lambda found: found.num_tensors == len(renamed),
    )


@follows("Name another version with --transformers-version.")
def names_of_a_version(at: Path) -> Case:
    source = tiny.model(at / "model", name="qwen3_vl_moe")
    common: dict[str, Any] = {"to": "dcp"}
    memory = {**common, "names": "memory", "transformers_version": "4.0"}
    return with_options(source, at, memory, common)
