"""Hints about what lies beside an output, what happens meanwhile, and the room on the disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file

import reshard
from reshard.transfer.commit import OutputFolder
from tests.commit.test_leftovers import partial
from tests.hints import tiny
from tests.hints.case import Case, follows, golden
from tests.hints.folders import after, converting
from tests.resume.runs import killed


def meanwhile(source: Path, out: Path, change: Callable[[], object], **options: Any) -> Any:
    """A conversion during which something changes, once."""
    changes = [change]

    def step(what: str, done: int, total: int) -> None:
        if changes:
            changes.pop()()

    return lambda: reshard.convert(source, out, progress=step, **options)


@follows("Free some space, or name an output on another disk.")
def full_disk(at: Path) -> Case:
    run = golden("zero2", at / "run")
    full = mock.Mock(return_value=mock.Mock(free=100))

    def convert() -> Any:
        with mock.patch.object(shutil, "disk_usage", full):
            return reshard.convert(run, at / "one")

    return Case(convert, converting(run, at / "two"))


@follows("Convert again.")
def lock_that_was_removed(at: Path) -> Case:
    run, out = golden("zero2", at / "run"), at / "out"
    removed = meanwhile(run, out, lambda: (at / ".out.lock").unlink())
    return Case(removed, converting(run, out))


@follows("Name another output, or remove what is there.")
def output_that_appeared(at: Path) -> Case:
    run = golden("zero2", at / "run")
    return Case(
        meanwhile(run, at / "out", lambda: _theirs(at / "out")), converting(run, at / "two")
    )


@follows("Name another output, or remove what is there.")
def output_that_appeared_removed(at: Path) -> Case:
    run, out = golden("zero2", at / "run"), at / "out"
    remove = after(lambda: shutil.rmtree(out), converting(run, out))
    return Case(meanwhile(run, out, lambda: _theirs(out)), remove)


def _theirs(folder: Path) -> None:
    folder.mkdir()
    (folder / "theirs").touch()


@follows("Wait for it to end. If no such process runs any more, remove this file.")
def output_of_another_run(at: Path) -> Case:
    run, out = golden("zero2", at / "run"), at / "out"
    first = OutputFolder(out, "first")
    first.__enter__()
    ended = after(lambda: first.__exit__(None, None, None), converting(run, out))
    return Case(converting(run, out), ended)


def _living(out: Path, digest: str) -> OutputFolder:
    """A run that lives, whose lock file was removed by hand."""
    first = OutputFolder(out, digest)
    first.__enter__()
    (out.parent / f".{out.name}.lock").unlink()
    return first


@follows("Wait for that process to end, or end it.")
def folder_that_a_process_writes_into(at: Path) -> Case:
    run, out = golden("zero2", at / "run"), at / "out"
    first = _living(out, "first")
    ended = after(lambda: first.__exit__(None, None, None), converting(run, out, overwrite=True))
    return Case(converting(run, out), ended, same=lambda report: not list(at.glob(".out.p*")))


@follows("Wait for it to end, or name another output.")
def folder_of_the_same_plan_that_a_process_writes_into(at: Path) -> Case:
    first = _living(at / "out", "digest")
    ended = after(lambda: first.__exit__(None, None, None), _writing(at / "out"))
    return Case(_writing(at / "out"), ended, same=lambda found: found == b"new")


@follows("Wait for it to end, or name another output.")
def folder_of_the_same_plan_and_another_output(at: Path) -> Case:
    first = _living(at / "out", "digest")

    def done(found: Any) -> bool:
        first.__exit__(None, None, None)
        return bool(found == b"new")

    return Case(_writing(at / "out"), _writing(at / "two"), same=done)


@follows("To continue it, run that command again with --resume. Without, it is removed.")
def run_of_other_options_that_was_killed(at: Path) -> Case:
    run, out = golden("zero2", at / "run"), at / "out"
    assert killed(converting(run, out), 6)
    other = converting(run, out, dtype="float16", resume=True)
    that = converting(run, out, resume=True, overwrite=True)
    return Case(other, that, same=lambda report: "resumed" in [f.code for f in report.findings])


@follows("To continue it, run that command again with --resume. Without, it is removed.")
def run_of_other_options_that_is_removed(at: Path) -> Case:
    run, out = golden("zero2", at / "run"), at / "out"
    assert killed(converting(run, out), 6)
    other = converting(run, out, dtype="float16", resume=True)
    without = converting(run, out, dtype="float16", overwrite=True)
    return Case(other, without, same=lambda report: not list(at.glob(".out.p*")))


def _writing(out: Path) -> Callable[[], Any]:
    def write() -> Any:
        with OutputFolder(out, "digest") as folder:
            folder.write("x", b"new")
            folder.commit()
        return (out / "x").read_bytes()

    return write


@follows("Remove it, or name another output.")
def link_in_place_of_the_partial_folder(at: Path) -> Case:
    (at / "theirs").mkdir()
    (at / ".out.partial-digest").symlink_to("theirs")
    removed = after((at / ".out.partial-digest").unlink, _writing(at / "out"))
    return Case(_writing(at / "out"), removed, same=lambda found: found == b"new")


@follows("Remove it, or name another output.")
def link_in_place_of_the_partial_folder_of_another_output(at: Path) -> Case:
    (at / "theirs").mkdir()
    (at / ".out.partial-digest").symlink_to("theirs")
    return Case(_writing(at / "out"), _writing(at / "two"), same=lambda found: found == b"new")


@follows("Remove them if nobody needs them.")
def leftover_that_no_run_marked(at: Path) -> Case:
    run = golden("zero2", at / "run")
    left = partial(at / "out")
    (left / "run.json").unlink()
    return Case(
        converting(run, at / "out"),
        after(lambda: shutil.rmtree(left), converting(run, at / "out", overwrite=True)),
    )


@follows("Delete the rest yourself.")
def old_output_that_cannot_be_deleted(at: Path) -> Case:
    run, out = golden("zero2", at / "run"), at / "out"
    reshard.convert(run, out)
    again = converting(run, out, overwrite=True)
    unlink = os.unlink

    def failing(name: str, *, dir_fd: int | None = None) -> None:
        if name == "model.safetensors":
            raise PermissionError(1, "not permitted")
        unlink(name, dir_fd=dir_fd)

    def stuck() -> Any:
        with mock.patch.object(os, "unlink", failing):
            return again()

    def delete() -> None:
        (left,) = at.glob(".out.partial-*")
        shutil.rmtree(left)

    return Case(stuck, after(delete, again), same=lambda report: not list(at.glob(".out.p*")))


@follows("Convert again once nothing writes to the checkpoint.")
def source_that_changes(at: Path) -> Case:
    model = tiny.model(at / "model")
    touch = lambda: os.utime(model / "model.safetensors", ns=(1, 1))  # noqa: E731
    return Case(meanwhile(model, at / "one", touch), converting(model, at / "two"))


@follows("Open the checkpoint again once nothing writes to it.")
def checkpoint_that_was_saved_again(at: Path) -> Case:
    path = tiny.model(at / "model") / "model.safetensors"
    opened = reshard.open(path.parent)

    def read() -> Any:
        save_file(tiny.state(5), path, {"format": "pt"})
        return opened.tensors[tiny.HEAD].numpy()

    def again() -> Any:
        return reshard.open(path.parent).tensors[tiny.HEAD].numpy()

    expected = tiny.state(5)[tiny.HEAD]
    return Case(read, again, same=lambda found: torch.equal(torch.from_numpy(found), expected))
