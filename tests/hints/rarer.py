"""Hints that rare inputs lead to: files of other machines and versions, damaged beyond a copy,
packages that are missing. Where the mend is done elsewhere (saved by another torch, trained
otherwise, installed), the case has what that leaves: the file, the run, the package."""

from __future__ import annotations

import functools
import os
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from torch import distributed
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate

import reshard
from reshard.conversion import memory_names
from reshard.core.plan import parse_size
from reshard.formats import info
from tests.folders import edit_saved
from tests.hints import tiny
from tests.hints.case import GOLDEN, Case, as_golden, follows, golden
from tests.hints.flags import with_options
from tests.hints.folders import _equal, after, converting, moved

NORM = "model.norm.weight"


# --- options and paths -------------------------------------------------------------------------


@follows("Name a local path; for a mounted store, the folder where it is mounted.")
def a_url(at: Path) -> Case:
    run = golden("zero2", at / "mnt" / "bucket" / "run")
    return Case(
        lambda: reshard.watch("s3://bucket/run", at / "one", base=at),
        converting(run, at / "two"),
        same=as_golden("zero2"),
    )


@contextmanager
def _cache(folder: Path) -> Iterator[None]:
    with mock.patch.dict(os.environ, {"HF_HUB_CACHE": str(folder)}):
        yield


@follows("It is not in the Hugging Face cache either. If it is on the hub: hf download {}")
def not_in_the_cache(at: Path) -> Case:
    """What `hf download` leaves is a snapshot in the cache."""
    run = tiny.zero(at / "run")

    def convert(out: Path) -> Any:
        with _cache(at / "cache"):
            return reshard.convert(run, out, base="org/name")

    def download() -> None:
        repository = at / "cache" / "models--org--name"
        tiny.model(repository / "snapshots" / ("a" * 40))
        (repository / "blobs").mkdir()

    return Case(lambda: convert(at / "one"), after(download, lambda: convert(at / "two")))


@follows("Use one of {}.")
def target_that_is_none(at: Path) -> Case:
    """For callers of the library's parts; `--to` is a choice, refused before."""
    return Case(lambda: info.output_format("onnx"), lambda: info.output_format("hf"))


@follows("Write a whole number of bytes, or a size like 5GB.")
def size_that_is_none(at: Path) -> Case:
    def size(value: Any) -> int:
        return parse_size(value)

    return Case(lambda: size(5.5), lambda: (size(5), size("5GB")), same=lambda both: both[0] == 5)


@follows("{} tensors differ, {} are equal.")
def against_another_run(at: Path) -> Case:
    run = tiny.zero(at / "run")
    other = tiny.zero(at / "other", {**tiny.state(), NORM: tiny.state()[NORM] + 1})
    reshard.convert(run, at / "out")
    return Case(
        lambda: reshard.verify(at / "out", against=other),
        lambda: reshard.verify(at / "out", against=run),
        same=lambda found: found.num_tensors == len(tiny.state()),
    )


@follows("Check the names when you load the output, or pass --transformers-version.")
def installed_version_that_was_never_read(at: Path) -> Case:
    model = tiny.model(at / "model")

    def convert(name: str, **options: Any) -> Any:
        with mock.patch.object(memory_names, "_installed", return_value=(99, 1)):
            return reshard.convert(model, at / name, to="dcp", names="memory", **options)

    return Case(lambda: convert("one"), lambda: convert("two", transformers_version="5.23"))


@follows("Load the output with strict names: one that differs is then an error.")
def named_version_that_was_never_read(at: Path) -> Case:
    """Loaded with strict names: here into a module of the version that is installed."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**tiny.config()))
    model.save_pretrained(at / "model")
    common: dict[str, Any] = {"to": "dcp", "names": "memory", "transformers_version": "99.1"}

    def load() -> Any:
        state = model.state_dict()
        expected = {name: value.clone() for name, value in state.items()}
        for value in state.values():
            value.zero_()
        dcp.load(state, checkpoint_id=at / "one", no_dist=True)
        return all(torch.equal(state[name], expected[name]) for name in expected)

    return Case(converting(at / "model", at / "one", **common), load, same=bool)


@follows("Without --names memory the names are those of the files.")
def names_in_memory_that_are_not_known(at: Path) -> Case:
    model = tiny.model(at / "model", model_type="kimi_linear")
    common: dict[str, Any] = {"to": "dcp"}
    return with_options(model, at, {**common, "names": "memory"}, {**common, "names": "disk"})


@follows("Name the version of another one of these ways, if it was trained with that.")
def square_experts(at: Path) -> Case:
    """Their orientation depends on the version, and the one that is named has no such model."""
    name = "qwen3_vl_moe"
    state = {
        key: value[:, : min(value.shape[1:]), : min(value.shape[1:])].contiguous()
        if "experts" in key
        else value
        for key, value in tiny.state(2, name).items()
    }
    run = tiny.saved(at / "x.pt", {k: v + 1 for k, v in state.items()})
    base = tiny.model(at / "base", name=name, tensors=state)
    common: dict[str, Any] = {"base": base}
    return with_options(
        run, at, {**common, "transformers_version": "4.0"},
        {**common, "transformers_version": "5.23"},
    )  # fmt: skip


# --- what is read ------------------------------------------------------------------------------


@follows("Name the part to read: --prefix {}.")
def an_average_alone(at: Path) -> Case:
    run = tiny.saved(at / "x.pt", {"ema": tiny.state(), "epoch": 3})
    base = tiny.model(at / "base")
    return with_options(run, at, {"base": base}, {"base": base, "prefix": "ema"})


@follows("Name the part to read: --prefix {}.")
def an_average_alone_of_dcp(at: Path) -> Case:
    dcp.save({"ema": tiny.state()}, checkpoint_id=at / "run", no_dist=True)
    base = tiny.model(at / "base")
    return with_options(at / "run", at, {"base": base}, {"base": base, "prefix": "ema"})


@follows("Name the file that holds the model.")
def file_of_an_optimizer(at: Path) -> Case:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    run = tiny.saved(at / "optimizer.pt", optimizer.state_dict())
    return moved(run, tiny.saved(at / "model.pt", model.state_dict()), at)


@follows("Load it and save it again with torch on a little-endian machine.")
def of_a_big_endian_machine(at: Path) -> Case:
    path = tiny.saved(at / "x.pt", tiny.state())
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(at / "big.pt", "w") as big:
        for entry in whole.infolist():
            big.writestr(entry, b"big" if "byteorder" in entry.filename else whole.read(entry))
    return moved(at / "big.pt", path, at)


@follows("No training framework writes such a file.")
def file_made_to_exhaust_memory(at: Path) -> Case:
    popping = b"\x80\x02N0N."
    path = tiny.saved(at / "x.pt", tiny.state())
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(at / "deep.pt", "w") as deep:
        for entry in whole.infolist():
            pickled = entry.filename.endswith("data.pkl")
            deep.writestr(entry, popping if pickled else whole.read(entry))
    return moved(at / "deep.pt", path, at)


@contextmanager
def _one_rank() -> Iterator[DeviceMesh]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield DeviceMesh("cpu", [0])
    finally:
        distributed.destroy_process_group()


@follows("Save it after redistributing it to Shard or Replicate.")
def not_yet_summed(at: Path) -> Case:
    def save(path: Path, placement: Placement) -> Path:
        with _one_rank() as mesh:
            summed = {
                n: DTensor.from_local(v, mesh, [Partial()]).redistribute(mesh, [placement])
                for n, v in tiny.state().items()
            }
            return tiny.saved(path, summed)

    wrong, right = (
        save(at / "a" / "m_rank0.pt", Partial()),
        save(at / "b" / "m_rank0.pt", Replicate()),
    )
    return Case(
        converting(wrong, at / "one"), converting(right, at / "two"),
        same=lambda report: _equal(at / "two", tiny.state()),
    )  # fmt: skip


@follows("Save with flatten_state_dict=True, which is the default.")
def shards_that_were_saved_whole(at: Path) -> Case:
    def save(folder: Path, *, flatten: bool) -> Path:
        with _one_rank() as mesh:
            state = {n: DTensor.from_local(v, mesh, [Replicate()]) for n, v in tiny.state().items()}
            planner = DefaultSavePlanner(flatten_state_dict=flatten)
            dcp.save({"model": state}, checkpoint_id=folder, planner=planner, no_dist=True)
        return folder

    wrong, right = save(at / "a", flatten=False), save(at / "b", flatten=True)
    return Case(
        converting(wrong, at / "one"), converting(right, at / "two"),
        same=lambda report: _equal(at / "two", tiny.state()),
    )  # fmt: skip


# --- DeepSpeed ---------------------------------------------------------------------------------


def _edited(at: Path, name: str, pattern: str, change: Callable[[dict[str, Any]], object]) -> Path:
    run = golden(name, at / "run")
    for path in (run / "global_step2").glob(pattern):
        edit_saved(path, change)
    return run


@follows("Load and save it once with a newer DeepSpeed.")
def of_an_old_deepspeed(at: Path) -> Case:
    """Before 0.6.0 it did not state the parameters' shapes."""

    def change(content: dict[str, Any]) -> None:
        content.pop("param_shapes", None)
        content.pop("ds_version", None)

    run = _edited(at, "zero2", "*", change)
    return moved(run, golden("zero2", at / "again"), at, same=as_golden("zero2"))


@follows("Save with DeepSpeed's save_16bit_model, or without NVMe offload.")
def weights_on_nvme(at: Path) -> Case:
    def change(content: dict[str, Any]) -> None:
        held = content["optimizer_state_dict"]
        held["fp32_flat_groups"] = [torch.empty(0) for _ in held["fp32_flat_groups"]]

    run = _edited(at, "zero3", "*optim*", change)
    return moved(run, golden("zero3", at / "again"), at, same=as_golden("zero3"))


@follows("Save with DeepSpeed's save_16bit_model, or without NVMe offload.")
def weights_on_nvme_and_a_16_bit_model(at: Path) -> Case:
    """What save_16bit_model writes is a state dict."""
    case = weights_on_nvme(at)
    sixteen = {name: value.bfloat16() for name, value in tiny.state().items()}
    path = tiny.saved(at / "16bit" / "pytorch_model.bin", sixteen)
    return Case(case.cause, converting(path.parent, at / "three", base=tiny.model(at / "base")))


@follows("The files come from different runs or world sizes.")
def flat_groups_of_another_size(at: Path) -> Case:
    def change(content: dict[str, Any]) -> None:
        held = content["optimizer_state_dict"]
        held["fp32_flat_groups"] = [flat[:-1].clone() for flat in held["fp32_flat_groups"]]

    run = _edited(at, "zero3", "*optim*", change)
    return moved(run, golden("zero3", at / "again"), at, same=as_golden("zero3"))


@follows("Pass --fill-from-base.")
def frozen_names_without_weights(at: Path) -> Case:
    """A save that excludes frozen parameters keeps their names in `module`."""
    tensors = {name: value for name, value in tiny.state().items() if name != NORM}
    run, base = tiny.zero(at / "run", tensors), tiny.model(at / "base")
    for path in run.glob("*model_states.pt"):
        edit_saved(path, lambda held: held["module"].update({NORM: torch.empty(0)}))
    return Case(
        converting(run, at / "one"),
        converting(run, at / "two", base=base, fill_from_base=True),
        same=lambda report: report.filled == (NORM,),
    )


# --- packages ----------------------------------------------------------------------------------


def _with_a_package(at: Path, value: str) -> Case:
    """A package that registers a format, and the same environment without it."""
    package = at / "site" / "other-1.0.dist-info"
    package.mkdir(parents=True)
    (package / "entry_points.txt").write_text(f"[reshard.formats]\nother = {value}\n")

    def convert(out: Path) -> Any:
        info.every.cache_clear()
        try:
            with mock.patch.object(sys, "path", [*sys.path, str(at / "site")]):
                return reshard.convert(GOLDEN / "zero2" / "checkpoint", out)
        finally:
            info.every.cache_clear()

    remove = functools.partial(shutil.rmtree, package)
    return Case(lambda: convert(at / "one"), after(remove, lambda: convert(at / "two")),
                same=as_golden("zero2"))  # fmt: skip


@follows("Remove that package.")
def package_that_registers_a_name_again(at: Path) -> Case:
    return _with_a_package(at, "reshard.formats.info:OWN")


@follows("Install that package again, or remove it.")
def package_that_is_gone(at: Path) -> Case:
    return _with_a_package(at, "a_package_that_is_gone:INFO")
