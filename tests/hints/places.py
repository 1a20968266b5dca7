"""Hints about the script to call, the base, the output, and a folder that was written."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from torch.distributed import checkpoint as dcp

import reshard
from reshard.cli.app import run as cli
from reshard.cli.lightrft.ds2hf import command as ds2hf
from reshard.cli.lightrft.fsdp2hf import command as fsdp2hf
from reshard.cli.lightrft.hf2fsdp import command as hf2fsdp
from tests.hints import tiny
from tests.hints.case import Case, follows
from tests.hints.folders import Call, _equal, after, converting

# --- the scripts -------------------------------------------------------------------------------


def _script(command: Any, *arguments: Path | str) -> Call:
    def call() -> object:
        import contextlib
        import io

        from reshard.errors import ReshardError

        out, said = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
            code = cli(command, [*map(str, arguments)])
        if code:
            words = said.getvalue()
            raise ReshardError(words, hint=words)
        return None

    return call


@follows("Convert it with ds2hf.")
def deepspeed_for_fsdp2hf(at: Path) -> Case:
    run, base = tiny.zero(at / "run"), tiny.model(at / "base")
    given = ("--hf_base", base, "--checkpoint_dir", run, "--output_dir")
    return Case(_script(fsdp2hf, *given, at / "a"), _script(ds2hf, *given, at / "b"))


@follows("Convert it with fsdp2hf.")
def dcp_for_ds2hf(at: Path) -> Case:
    base = tiny.model(at / "base")
    dcp.save(tiny.state(), checkpoint_id=at / "run", no_dist=True)
    given = ("--hf_base", base, "--checkpoint_dir", at / "run", "--output_dir")
    return Case(_script(ds2hf, *given, at / "a"), _script(fsdp2hf, *given, at / "b"))


@follows("Convert it with hf2fsdp.")
def model_for_ds2hf(at: Path) -> Case:
    model = tiny.model(at / "model")
    given = ("--hf_base", model, "--checkpoint_dir", model, "--output_dir", at / "a")
    right = ("--hf_checkpoint", model, "--output", at / "b")
    return Case(_script(ds2hf, *given), _script(hf2fsdp, *right))


@follows("Below it there is one: {}.")
def one_below(at: Path) -> Case:
    run = tiny.model(at / "run")
    below = tiny.zero(run / "checkpoint-7" / "global_step7")
    given = ("--hf_base", tiny.model(at / "base"), "--output_dir")
    return Case(
        _script(ds2hf, *given, at / "a", "--checkpoint_dir", run),
        _script(ds2hf, *given, at / "b", "--checkpoint_dir", below.parent),
    )


@follows(" It also holds an exported model: name the file of that to convert it.")
def the_export_beside(at: Path) -> Case:
    run = tiny.model(at / "run")
    tiny.zero(run / "global_step7")
    (run / "latest").write_text("global_step7")
    return Case(
        _script(hf2fsdp, "--hf_checkpoint", run, "--output", at / "a"),
        _script(hf2fsdp, "--hf_checkpoint", run / "model.safetensors", "--output", at / "b"),
    )


# --- the base ----------------------------------------------------------------------------------


def on(at: Path, wrong: Path, mend: Call = lambda: None, right: Path | None = None) -> Case:
    """A conversion onto a base that is none, and onto the one that the hint names."""
    run = tiny.zero(at / "run")
    return Case(
        converting(run, at / "one", base=wrong),
        after(mend, converting(run, at / "two", base=right or wrong)),
        same=lambda report: _equal(at / "two", tiny.state()),
    )


@follows("--base must be a local folder with the original model.")
def no_base(at: Path) -> Case:
    return on(at, at / "nowhere", right=tiny.model(at / "base"))


@follows(
    "Name the folder of the whole original model. Trainers leave only config and tokenizer beside "
    "a checkpoint (verl's `huggingface/`)."
)
def base_without_weights(at: Path) -> Case:
    shutil.copytree(tiny.model(at / "base"), at / "bare")
    (at / "bare" / "model.safetensors").unlink()
    return on(at, at / "bare", right=at / "base")


@follows("Name the folder of the Hugging Face model that the training started from.")
def base_without_config(at: Path) -> Case:
    shutil.copytree(tiny.model(at / "base"), at / "bare")
    (at / "bare" / "config.json").unlink()
    return on(at, at / "bare", right=at / "base")


@follows(
    "Name the model that it was trained on, which adapter_config.json states as "
    "base_model_name_or_path."
)
def adapter_as_base(at: Path) -> Case:
    base = tiny.model(at / "base")
    return on(at, tiny.adapter(at / "adapter", base_model_name_or_path=str(base)), right=base)


@follows("Remove it, or put the file itself there.")
def pipe_in_the_base(at: Path) -> Case:
    base = tiny.model(at / "base")
    os.mkfifo(base / "notes.txt")
    return on(at, base, (base / "notes.txt").unlink)


@follows("Make it readable, or remove it from the folder if the model does not need it.")
def broken_link_in_the_base(at: Path) -> Case:
    base = tiny.model(at / "base")
    (base / "notes.txt").symlink_to("nowhere")
    return on(at, base, (base / "notes.txt").unlink)


@follows("Rename it, or move it away.")
def name_that_is_no_text(at: Path) -> Case:
    base = tiny.model(at / "base")
    strange = Path(os.fsdecode(os.fsencode(base) + b"/\xff.txt"))
    strange.touch()
    return on(at, base, lambda: strange.rename(base / "x.txt"))


def _cached(at: Path, *commits: str) -> Path:
    repository = at / "models--org--name"
    (repository / "blobs").mkdir(parents=True)
    (repository / "snapshots").mkdir()
    for commit in commits:
        tiny.model(repository / "snapshots" / commit)
    return repository


@follows("Name the folder of one of them.")
def two_snapshots(at: Path) -> Case:
    repository = _cached(at, "a" * 40, "b" * 40)
    return on(at, repository, right=repository / "snapshots" / ("a" * 40))


@follows("Download the model again.")
def no_snapshot(at: Path) -> Case:
    repository = _cached(at)
    return on(at, repository, lambda: tiny.model(repository / "snapshots" / ("a" * 40)))


@follows("Download the model again, or name the folder below snapshots.")
def no_pointer(at: Path) -> Case:
    repository = _cached(at, "a" * 40)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_bytes(bytes(1 << 20))
    return on(at, repository, right=repository / "snapshots" / ("a" * 40))


# --- the output --------------------------------------------------------------------------------


@follows("Name another output, or pass --overwrite to replace it.")
def output_of_reshard(at: Path) -> Case:
    run = tiny.zero(at / "run")
    reshard.convert(run, at / "out")
    return Case(converting(run, at / "out"), converting(run, at / "out", overwrite=True))


@follows("Are SRC and DST swapped? SRC comes first. Name another output, or remove it yourself.")
def swapped(at: Path) -> Case:
    run, base = tiny.zero(at / "run"), tiny.model(at / "base")
    return Case(converting(base, run), converting(run, at / "out", base=base))


@follows("Are SRC and DST swapped? SRC comes first. Name another output, or remove it yourself.")
def swapped_and_overwriting(at: Path) -> Case:
    run, base = tiny.zero(at / "run"), tiny.model(at / "base")
    return Case(converting(base, run, overwrite=True), converting(base, at / "out"))


@follows("Name another output, or remove it yourself.")
def output_of_somebody(at: Path) -> Case:
    run = tiny.zero(at / "run")
    (at / "notes").mkdir()
    (at / "notes" / "mine.txt").write_text("x")
    return Case(converting(run, at / "notes", overwrite=True), converting(run, at / "out"))


@follows("Name another output, or move them out of the folder.")
def output_with_a_file_of_the_users(at: Path) -> Case:
    run = tiny.zero(at / "run")
    reshard.convert(run, at / "out")
    (at / "out" / "mine.txt").write_text("x")
    return Case(
        converting(run, at / "out", overwrite=True),
        after(
            lambda: (at / "out" / "mine.txt").rename(at / "mine.txt"),
            converting(run, at / "out", overwrite=True),
        ),
    )


@follows("Name a new folder.")
def output_is_the_source(at: Path) -> Case:
    run = tiny.zero(at / "run")
    return Case(converting(run, run), converting(run, at / "out"))


@follows("Name a new folder.")
def output_is_named_like_a_file(at: Path) -> Case:
    run = tiny.zero(at / "run")
    return Case(converting(run, at / "out.safetensors"), converting(run, at / "out"))


@follows("Name a folder outside of it.")
def output_inside_the_source(at: Path) -> Case:
    run = tiny.zero(at / "run")
    return Case(converting(run, run / "out"), converting(run, at / "out"))


@follows("Name that folder itself, or another output.")
def output_is_a_link(at: Path) -> Case:
    run = tiny.zero(at / "run")
    reshard.convert(run, at / "out")
    (at / "link").symlink_to(at / "out")
    return Case(
        converting(run, at / "link", overwrite=True), converting(run, at / "out", overwrite=True)
    )


@follows("Name another output.")
def output_is_a_file(at: Path) -> Case:
    run = tiny.zero(at / "run")
    (at / "file").write_text("x")
    return Case(converting(run, at / "file"), converting(run, at / "out"))


# --- what was written --------------------------------------------------------------------------


def verifying(out: Path) -> Call:
    return lambda: reshard.verify(out)


def _written(at: Path) -> tuple[Path, Path]:
    run = tiny.zero(at / "run")
    reshard.convert(run, at / "out")
    return run, at / "out"


@follows("Only folders that reshard wrote contain digests.")
def not_of_reshard(at: Path) -> Case:
    _, out = _written(at)
    return Case(verifying(tiny.model(at / "model")), verifying(out))


@follows("Convert the checkpoint again.")
def damaged_manifest(at: Path) -> Case:
    run, out = _written(at)
    (out / "reshard.json").write_text("{")
    return Case(
        verifying(out), converting(run, at / "again"), same=lambda r: bool(reshard.verify(r.target))
    )


@follows("Convert again. If it happens again, check the disk.")
def flipped_bit(at: Path) -> Case:
    run, out = _written(at)
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (out / "model.safetensors").write_bytes(data)
    return Case(verifying(out), converting(run, at / "again"))


@follows("Move it away, or convert again: what is not listed cannot be verified.")
def unlisted(at: Path) -> Case:
    _, out = _written(at)
    shutil.copy(out / "model.safetensors", out / "other.safetensors")
    return Case(verifying(out), after((out / "other.safetensors").unlink, verifying(out)))


@follows("Use the reshard that wrote it, or a later one.")
def of_a_later_reshard(at: Path) -> Case:
    _, out = _written(at)
    path = out / "reshard.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "version": 999}))
    # The reshard that wrote version `content["version"]` is this one.
    return Case(verifying(out), after(lambda: path.write_text(json.dumps(content)), verifying(out)))
