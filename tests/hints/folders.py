"""Hints that name another folder or file, or ask to move, remove or save something again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed import checkpoint as dcp

import reshard
from tests.hints import tiny
from tests.hints.case import GOLDEN, Case, as_golden, follows, golden

Call = Callable[[], Any]


def converting(source: Path, out: Path, **options: Any) -> Call:
    return lambda: reshard.convert(source, out, **options)


def after(change: Call, call: Call) -> Call:
    """A call that follows a change of the files."""

    def done() -> Any:
        change()
        return call()

    return done


def moved(source: Path, named: Path, at: Path, **more: Any) -> Case:
    """A folder or file that cannot be converted, and the one that the hint names."""
    return Case(converting(source, at / "one"), converting(named, at / "two"), **more)


# --- the source --------------------------------------------------------------------------------


@follows("Name the folder that holds the checkpoint's files, or the folder above it.")
def not_here(at: Path) -> Case:
    run = golden("zero2", at / "run")
    (run / "logs").mkdir()
    (run / "logs" / "log.txt").write_text("x")
    return moved(run / "logs", run, at, same=as_golden("zero2"))


@follows("Pass its folder: {}")
def no_file_of_a_model(at: Path) -> Case:
    run = golden("zero2", at / "run")
    return moved(run / "latest", run, at, same=as_golden("zero2"))


@follows("Name the folder that contains it.")
def rounded_weights(at: Path) -> Case:
    run = golden("zero2", at / "run")
    file = run / "global_step2" / "mp_rank_00_model_states.pt"
    return moved(file, run, at, same=as_golden("zero2"))


@follows("Name the folder that holds it: {}.")
def one_file_of_several(at: Path) -> Case:
    run = golden("zero3", at / "run") / "global_step2"
    file = next(run.glob("zero_pp_rank_0*_model_states.pt"))
    return moved(file, run, at, same=as_golden("zero3"))


@follows("Name the folder of the one to read.")
def two_formats(at: Path) -> Case:
    run = golden("zero2", at / "run")
    shutil.copytree(GOLDEN / "dcp" / "checkpoint", run / "global_step2", dirs_exist_ok=True)
    shutil.copytree(GOLDEN / "dcp" / "checkpoint", at / "apart")
    return moved(run / "global_step2", at / "apart", at, same=as_golden("dcp"))


@follows("Name one of them.")
def two_runs(at: Path) -> Case:
    for name in ("one", "two"):
        golden("zero2", at / "runs" / name / "save")
    return moved(at / "runs", at / "runs" / "one", at, same=as_golden("zero2"))


@follows("Copy the newest one again, or name the one to read.")
def newest_is_incomplete(at: Path) -> Case:
    runs = at / "runs"
    for step in (1, 2):
        shutil.copytree(GOLDEN / "dcp" / "checkpoint", runs / f"step_{step}")
    (runs / "step_2" / "__0_0.distcp").unlink()
    return moved(runs, runs / "step_1", at, same=as_golden("dcp"))


@follows("To convert one of them, name its folder.")
def checkpoint_below_an_export(at: Path) -> Case:
    run = tiny.model(at / "run")
    below = tiny.zero(run / "checkpoint-7" / "global_step7")
    return moved(run, below.parent, at)


@follows("To convert the exported model, name its file.")
def export_beside(at: Path) -> Case:
    run = tiny.model(at / "run")
    tiny.zero(run / "global_step7")
    (run / "latest").write_text("global_step7")
    return moved(run, run / "model.safetensors", at)


@follows("{} Or convert the model that was exported beside it: name its file.")
def export_beside_what_is_incomplete(at: Path) -> Case:
    run = tiny.model(at / "run")
    tag = tiny.zero(run / "global_step7")
    (run / "latest").write_text("global_step7")
    next(tag.glob("*optim*")).unlink()
    return moved(run, run / "model.safetensors", at)


@follows("To convert it, name it.")
def newer_export(at: Path) -> Case:
    tiny.zero(at / "run" / "checkpoint-1" / "global_step1")
    newer = tiny.model(at / "run" / "checkpoint-2")
    return moved(at / "run", newer, at)


@follows("For the whole model, name its folder.")
def one_shard(at: Path) -> Case:
    reshard.convert(tiny.model(at / "model"), at / "shards", max_shard_size="20KB")
    shard = next((at / "shards").glob("model-00001-of-*.safetensors"))
    return moved(shard, at / "shards", at, same=lambda report: report.num_tensors == 21)


@follows("To convert another, name it.")
def several_of_accelerate(at: Path) -> Case:
    for number in (0, 1):
        shutil.copytree(GOLDEN / "dcp/checkpoint", at / "run" / f"pytorch_model_fsdp_{number}")
    return moved(at / "run", at / "run" / "pytorch_model_fsdp_1", at, same=as_golden("dcp"))


@follows("To convert one, name it.")
def another_file_beside(at: Path) -> Case:
    folder = tiny.model(at / "model")
    shutil.copy(folder / "model.safetensors", folder / "model_1.safetensors")
    return moved(folder, folder / "model_1.safetensors", at)


@follows("To convert it, pass --prefix {}.")
def another_part(at: Path) -> Case:
    """A second model in one state dict: `policy` beside `model`."""
    state = {"model": tiny.state(), "ema": tiny.state(3)}
    dcp.save(state, checkpoint_id=at / "run", no_dist=True)
    return Case(
        converting(at / "run", at / "one"), converting(at / "run", at / "two", prefix="ema")
    )


# --- ranks and saves ---------------------------------------------------------------------------


VERL = "global_step_7/actor/model_world_size_{}_rank_{}.pt"


@follows("Name a file of the save to read ({}), or move the others away.")
def two_worlds(at: Path) -> Case:
    run = golden("ranks/no-mesh", at / "run")
    (run / "global_step_7/actor/fsdp_config.json").unlink()
    for rank in range(2):
        other = GOLDEN / "ranks/experts/checkpoint" / VERL.format(2, rank)
        shutil.copy(other, run / VERL.format(2, rank))
    return moved(run, run / VERL.format(3, 0), at)


@follows("Name the one to read with --role, or its folder.")
def two_roles(at: Path) -> Case:
    run = golden("ranks/no-mesh", at / "run")
    shutil.copytree(run / "global_step_7" / "actor", run / "global_step_7" / "critic")
    step = run / "global_step_7"
    return Case(converting(step, at / "one"), converting(step, at / "two", role="critic"))


@follows("Name one of them with --role, or its folder.")
def no_such_role(at: Path) -> Case:
    step = golden("ranks/no-mesh", at / "run") / "global_step_7"
    return Case(
        converting(step, at / "one", role="critic"), converting(step, at / "two", role="actor")
    )


@follows("Name a file of the one to read.")
def rank_files_of_two_models(at: Path) -> Case:
    for model in ("actor", "critic"):
        for rank in range(2):
            tiny.saved(at / "run" / f"{model}_rank{rank}.pt", {"w": torch.ones(2)})
    return moved(at / "run", at / "run" / "critic_rank0.pt", at)


@follows("Keep the files of one save.")
def two_files_of_a_rank(at: Path) -> Case:
    for name in ("m_rank0.pt", "m_rank1.pt", "m_rank_1.pt"):
        tiny.saved(at / "run" / name, {"w": torch.ones(2)})
    mend = after(lambda: (at / "run" / "m_rank_1.pt").unlink(), converting(at / "run", at / "two"))
    return Case(converting(at / "run", at / "one"), mend)


@follows("Copy the files of all ranks again, from one save.")
def ranks_that_differ(at: Path) -> Case:
    for rank in range(2):
        tiny.saved(at / "run" / f"m_rank{rank}.pt", {"w": torch.ones(2) + rank})
    mend = after(
        lambda: tiny.saved(at / "run" / "m_rank1.pt", {"w": torch.ones(2)}),
        converting(at / "run", at / "two"),
    )
    return Case(converting(at / "run", at / "one"), mend)


@follows("Name the files that torch.save(model.state_dict(), ...) wrote.")
def ranks_without_weights(at: Path) -> Case:
    for rank in range(2):
        tiny.saved(at / "run" / f"m_rank{rank}.pt", {"epoch": 3})
    whole = tiny.saved(at / "whole.pt", tiny.state())
    return moved(at / "run", whole, at)


@follows("Name a file that torch.save(model.state_dict(), ...) wrote.")
def file_without_weights(at: Path) -> Case:
    run = tiny.saved(at / "x.pt", {"epoch": 3})
    return moved(run, tiny.saved(at / "y.pt", tiny.state()), at)


@follows("Save the model's state_dict() with torch.save.")
def torchscript(at: Path) -> Case:
    module = torch.nn.Linear(2, 2)
    path = at / "x.pt"
    torch.jit.script(module).save(path)
    return moved(path, tiny.saved(at / "y.pt", module.state_dict()), at)


@follows("Copy the missing shard.")
def a_bin_shard_is_missing(at: Path) -> Case:
    folder = at / "model"
    names = [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
    for number, name in enumerate(names):
        tiny.saved(folder / name, {f"w{number}": torch.ones(3)})
    index = {"weight_map": {f"w{n}": name for n, name in enumerate(names)}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (folder / names[1]).rename(at / "aside")
    mend = after(lambda: (at / "aside").rename(folder / names[1]), converting(folder, at / "two"))
    return Case(converting(folder, at / "one"), mend)


def _sharded(at: Path) -> tuple[Path, Path]:
    reshard.convert(tiny.model(at / "model"), at / "shards", max_shard_size="20KB")
    return at / "shards", sorted((at / "shards").glob("model-*.safetensors"))[1]


@follows("Download or copy the missing shard.")
def a_listed_shard_is_missing(at: Path) -> Case:
    folder, shard = _sharded(at)
    shard.rename(at / "aside")
    mend = after(lambda: (at / "aside").rename(shard), converting(folder, at / "two"))
    return Case(converting(folder, at / "one"), mend)


@follows("Download or copy the missing shards.")
def a_shard_and_the_index_are_missing(at: Path) -> Case:
    folder, shard = _sharded(at)
    shard.rename(at / "aside")
    (folder / "model.safetensors.index.json").unlink()
    mend = after(lambda: (at / "aside").rename(shard), converting(folder, at / "two"))
    return Case(converting(folder, at / "one"), mend)


@follows("The index belongs to other files; copy the folder again.")
def an_index_of_other_files(at: Path) -> Case:
    folder, shard = _sharded(at)
    shutil.copy(shard, at / "aside")
    save_file({"other": torch.ones(2)}, shard)
    mend = after(lambda: shutil.copy(at / "aside", shard), converting(folder, at / "two"))
    return Case(converting(folder, at / "one"), mend)


@follows("Remove the files of the older save.")
def with_and_without_zero3(at: Path) -> Case:
    run = golden("zero3", at / "run")
    older = run / "global_step2" / "mp_rank_01_model_states.pt"
    shutil.copy(GOLDEN / "zero2/checkpoint/global_step2/mp_rank_00_model_states.pt", older)
    mend = after(older.unlink, converting(run, at / "two"))
    return Case(converting(run, at / "one"), mend, same=as_golden("zero3"))


@follows("They come from different saves; remove the older one.")
def two_files_of_a_zero_rank(at: Path) -> Case:
    run = golden("zero2", at / "run")
    newer = next((run / "global_step2").glob("bf16_zero_pp_rank_1_*"))
    older = newer.with_name(newer.name.removeprefix("bf16_"))
    shutil.copy(newer, older)
    mend = after(older.unlink, converting(run, at / "two"))
    return Case(converting(run, at / "one"), mend, same=as_golden("zero2"))


@follows("Remove the files that an older save left.")
def files_of_a_larger_world(at: Path) -> Case:
    run = golden("zero2", at / "run")
    newer = next((run / "global_step2").glob("bf16_zero_pp_rank_1_*"))
    older = newer.with_name(newer.name.replace("rank_1", "rank_7"))
    shutil.copy(newer, older)
    mend = after(older.unlink, converting(run, at / "two"))
    return Case(converting(run, at / "one"), mend, same=as_golden("zero2"))


@follows("The save is incomplete.")
def latest_of_nothing(at: Path) -> Case:
    (at / "run" / "global_step1").mkdir(parents=True)
    (at / "run" / "latest").write_text("global_step1")
    return moved(at / "run", golden("zero2", at / "other"), at)


@follows("Move .metadata, or all files __*.metadata, away: those of the other save.")
def two_dcp_saves(at: Path) -> Case:
    run = golden("dcp", at / "run")
    shutil.copy(run / ".metadata", run / "__0.metadata")
    mend = after((run / "__0.metadata").unlink, converting(run, at / "two"))
    return Case(converting(run, at / "one"), mend, same=as_golden("dcp"))


@follows("Use another checkpoint.")
def a_later_save_began(at: Path) -> Case:
    run = golden("dcp", at / "run")
    (run / ".metadata.tmp").touch()
    return moved(run, GOLDEN / "dcp" / "checkpoint", at, same=as_golden("dcp"))


@follows("There is nothing to convert.")
def dcp_without_tensors(at: Path) -> Case:
    dcp.save({"step": 5}, checkpoint_id=at / "run", no_dist=True)
    return moved(at / "run", golden("dcp", at / "other"), at, same=as_golden("dcp"))


@follows("The model's checkpoint lies beside it or in the folder above.")
def an_optimizer_alone(at: Path) -> Case:
    state = {"state": {"w": {"exp_avg": torch.ones(2)}}, "param_groups": {"lr": 1.0}}
    dcp.save(state, checkpoint_id=at / "run" / "optim", no_dist=True)
    dcp.save({"w": torch.ones(2)}, checkpoint_id=at / "run" / "model", no_dist=True)
    return moved(at / "run" / "optim", at / "run", at)


@follows("Load the checkpoint, remove the wrong one of the two, and save it again.")
def two_tensors_of_a_name(at: Path) -> Case:
    mine = tiny.state()
    both = {**mine, **{f"module.{name}": value + 1 for name, value in mine.items()}}
    run, base = tiny.saved(at / "x.pt", both), tiny.model(at / "base")

    def take_out() -> None:
        held = torch.load(run, weights_only=True)
        torch.save({name: held[name] for name in mine}, run)

    return Case(
        converting(run, at / "one", base=base),
        after(take_out, converting(run, at / "two", base=base)),
        same=lambda report: _equal(at / "two", mine),
    )


@follows("Load the checkpoint, remove the wrong one of the two, and save it again.")
def two_tensors_of_a_name_below_a_prefix(at: Path) -> Case:
    mine = {f"actor.{name}": value for name, value in tiny.state().items()}
    both = {**mine, **{f"module.{name}": value + 1 for name, value in mine.items()}}
    run, base = tiny.saved(at / "x.pt", both), tiny.model(at / "base")
    return Case(
        converting(run, at / "one", base=base, prefix="actor"),
        after(
            lambda: tiny.saved(run, mine), converting(run, at / "two", base=base, prefix="actor")
        ),
        same=lambda report: _equal(at / "two", tiny.state()),
    )


def _equal(folder: Path, tensors: tiny.State) -> bool:
    held = reshard.open(folder).tensors
    return all((held[n].numpy() == value.numpy()).all() for n, value in tensors.items())


@follows("Load it with the safetensors library, which accepts that, and save it again.")
def a_header_after_white_space(at: Path) -> Case:
    path = at / "model.safetensors"
    header = b'  {"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}      '
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    mend = after(lambda: save_file({"w": torch.zeros(2)}, path), converting(path, at / "two"))
    return Case(converting(path, at / "one"), mend)
