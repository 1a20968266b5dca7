"""`--overwrite` replaces what reshard wrote and what is empty, and nothing else, ever."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import reshard
from reshard.cli.app import reshard as command
from reshard.cli.app import run
from tests.golden.table import HERE as GOLDEN


def contents(folder: Path) -> dict[str, bytes | str]:
    """Everything at a path, to be compared later."""
    if folder.is_file():
        return {"": folder.read_bytes()}
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = f"link to {path.readlink()}"
        elif path.is_file():
            found[name] = path.read_bytes()
        else:
            found[name] = "folder" if path.is_dir() else "other"
    return found


def later(path: Path) -> None:
    """Wait until a change is dated after `path`: file systems count in ticks of some ms."""
    probe = path.parent.parent / "probe"
    while True:
        probe.touch()
        newer = probe.stat().st_ctime_ns > path.stat().st_ctime_ns
        probe.unlink()
        if newer:
            return


@pytest.fixture
def out(model: Path, tmp_path: Path) -> Path:
    """A folder that reshard wrote, with files of the base, some time ago."""
    folder = tmp_path / "out"
    reshard.convert(model, folder, base=model, allow_unchanged=True)
    later(folder / "reshard.json")
    return folder


def deepspeed(place: Path) -> None:
    shutil.copytree(GOLDEN / "zero2" / "checkpoint", place)


def deepspeed_tag(place: Path) -> None:
    shutil.copytree(GOLDEN / "zero3" / "checkpoint" / "global_step2", place)


def dcp(place: Path) -> None:
    shutil.copytree(GOLDEN / "dcp" / "checkpoint", place)


def hub_model(place: Path) -> None:
    place.mkdir()
    (place / "config.json").write_text("{}", encoding="utf-8")
    save_file({"w": np.ones(2, np.float32)}, place / "model.safetensors")


def adapter(place: Path) -> None:
    place.mkdir()
    (place / "adapter_config.json").write_text("{}", encoding="utf-8")
    save_file({"w": np.ones(2, np.float32)}, place / "adapter_model.safetensors")


def runs(place: Path) -> None:
    for name in ("one", "two"):
        deepspeed(place / name / "_actor")


def documents(place: Path) -> None:
    (place / "sub").mkdir(parents=True)
    (place / "thesis.tex").write_text("years of work", encoding="utf-8")


def hidden(place: Path) -> None:
    place.mkdir()
    (place / ".git").mkdir()


def impostor(place: Path) -> None:
    documents(place)
    (place / "reshard.json").write_text("{}", encoding="utf-8")


def borrowed(place: Path) -> None:
    """A training checkpoint into which somebody copied another folder's reshard.json."""
    deepspeed(place)
    (place / "global_step2" / "reshard.json").write_text("not JSON", encoding="utf-8")
    (place / "reshard.json").symlink_to("/etc/hostname")


def text_file(place: Path) -> None:
    place.write_text("notes", encoding="utf-8")


def pipe(place: Path) -> None:
    os.mkfifo(place)


FOREIGN: dict[Callable[[Path], None], str] = {
    deepspeed: "a DeepSpeed checkpoint",
    deepspeed_tag: "a DeepSpeed checkpoint",
    dcp: "a PyTorch DCP (FSDP) checkpoint",
    hub_model: "a Hugging Face model",
    adapter: "an adapter of PEFT",
    runs: "a folder with 2 checkpoints (one/_actor, two/_actor)",
    documents: "a folder with sub/, thesis.tex",
    hidden: "a folder with .git/",
    impostor: "a folder with reshard.json, sub/, thesis.tex",
    borrowed: "a DeepSpeed checkpoint",
    text_file: "is a file, not a folder",
    pipe: "is a file, not a folder",
}


@pytest.mark.parametrize("make", FOREIGN, ids=lambda make: make.__name__)
def test_what_reshard_did_not_write_is_never_replaced(
    make: Callable[[Path], None], model: Path, tmp_path: Path
) -> None:
    place = tmp_path / "place"
    make(place)
    before = contents(place) if place.is_dir() else {}
    for overwrite in (True, False):
        for dry_run in (True, False):
            with pytest.raises(reshard.WriteError) as caught:
                reshard.convert(model, place, overwrite=overwrite, dry_run=dry_run)
            words = str(caught.value)
            assert FOREIGN[make] in words
            assert "--overwrite" not in words
            swapped = make not in (documents, hidden, impostor, text_file, pipe)
            assert ("Are SRC and DST swapped?" in words) == swapped
    assert not place.is_dir() or contents(place) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "place"]


def test_source_and_target_exchanged(model: Path, tmp_path: Path) -> None:
    """The command that once deleted a training checkpoint, and the one that was meant."""
    place = tmp_path / "run"
    deepspeed(place)
    before = contents(place)
    assert run(command, ["convert", str(model), str(place), "--overwrite"]) == 1
    assert contents(place) == before
    assert run(command, ["convert", str(place), str(tmp_path / "out"), "--overwrite"]) == 0


def added_file(out: Path) -> None:
    (out / "notes.txt").write_text("mine", encoding="utf-8")


def added_checkpoint(out: Path) -> None:
    deepspeed(out / "training")


def moved_in(out: Path) -> None:
    """Files keep their times when their folder is moved."""
    outside = out.parent / "outside"
    outside.mkdir()
    (outside / "notes.txt").write_text("mine", encoding="utf-8")
    outside.rename(out / "outside")


def edited(out: Path) -> None:
    config = out / "config.json"
    config.write_text(config.read_text("utf-8").replace("llama", "llamb"), encoding="utf-8")


def edited_and_backdated(out: Path) -> None:
    edited(out)
    os.utime(out / "config.json", (1, 1))


def trained_further(out: Path) -> None:
    """Another program saved into the folder: same names, shapes and sizes, other values."""
    tensors = {name: value + 1 for name, value in load_file(out / "model.safetensors").items()}
    save_file(tensors, out / "model.safetensors")


def flipped(out: Path) -> None:
    with (out / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")


def linked_file(out: Path) -> None:
    (out / "config.json").rename(out.parent / "config.json")
    (out / "config.json").symlink_to(out.parent / "config.json")


def linked_folder(out: Path) -> None:
    (out / "data").symlink_to(out.parent)


CHANGES = [added_file, added_checkpoint, moved_in, edited, edited_and_backdated, trained_further,
           flipped, linked_file, linked_folder]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_others_did_to_an_output_is_never_lost(
    change: Callable[[Path], None], model: Path, out: Path
) -> None:
    change(out)
    before = contents(out)
    for overwrite in (True, False):
        with pytest.raises(reshard.WriteError, match="were added or changed") as caught:
            reshard.convert(model, out, overwrite=overwrite)
        assert "--overwrite" not in str(caught.value)
    assert contents(out) == before


def copied(out: Path) -> None:
    """`cp -r` in the wrong order: every file is newer than reshard.json."""
    shutil.copytree(out, out.parent / "copy")
    shutil.rmtree(out)
    (out.parent / "copy").rename(out)
    (out / "reshard.json").write_bytes((out / "reshard.json").read_bytes())
    later(out / "reshard.json")
    for path in out.rglob("*"):
        if path.is_file() and path.name != "reshard.json":
            path.chmod(0o640)


def cached(out: Path) -> None:
    (out / "chat" / "__pycache__").mkdir()
    (out / "chat" / "__pycache__" / "code.cpython-312.pyc").touch()


def lost_a_file(out: Path) -> None:
    (out / "config.json").unlink()


def untouched(out: Path) -> None:
    pass


def emptied(out: Path) -> None:
    shutil.rmtree(out)
    out.mkdir()


@pytest.mark.parametrize("change", [untouched, copied, cached, lost_a_file, emptied],
                         ids=lambda change: change.__name__)  # fmt: skip
def test_what_reshard_wrote_is_replaced_and_said_to_be(
    change: Callable[[Path], None], model: Path, out: Path
) -> None:
    change(out)
    report = reshard.convert(model, out, dtype="float16", overwrite=True, dry_run=True)
    assert (out / "config.json").exists() or change in (lost_a_file, emptied)
    if change is emptied:
        assert report.replaced is None
        assert report.to_json()["replaced"] is None
    else:
        assert report.replaced is not None
        stated = report.to_json()["replaced"]
        assert stated["path"] == str(out)
        assert stated["nbytes"] > 12_000
    assert reshard.convert(model, out, dtype="float16", overwrite=True).replaced == report.replaced
    assert load_file(out / "model.safetensors")["w"].dtype == np.float16


@pytest.mark.parametrize("dry", [True, False])
def test_the_command_says_what_is_replaced(
    dry: bool, model: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["convert", str(model), str(out)]
    assert run(command, arguments) == 1
    assert "reshard wrote it, 4 files" in (said := capsys.readouterr().err)
    assert "--overwrite" in said
    assert run(command, [*arguments, "--overwrite", *["--dry-run"] * dry]) == 0
    shown = capsys.readouterr().out
    assert re.search(rf"{'would replace' if dry else 'replaced'} +{out} \(written by resh", shown)


def without_list(out: Path) -> None:
    """As versions before wrote it, without the list of files."""
    path = out / "reshard.json"
    stated = json.loads(path.read_text("utf-8"))
    del stated["files"]
    path.write_text(json.dumps(stated), encoding="utf-8")
    later(path)


def test_an_output_of_an_earlier_version(model: Path, out: Path) -> None:
    """Nothing tells what was added to it, once it was copied."""
    without_list(out)
    added_file(out)
    copied(out)
    before = contents(out)
    for overwrite in (True, False):
        with pytest.raises(reshard.WriteError, match="lists no files") as caught:
            reshard.convert(model, out, overwrite=overwrite)
        assert "--overwrite" not in str(caught.value)
    assert contents(out) == before
    reshard.verify(out)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_change_of_the_same_size_in_a_copy(name: str, model: Path, out: Path) -> None:
    """Trained on in place, or edited, and then copied with its times (`cp -a`, rsync)."""
    path = out / name
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    away = out.with_name("copy")
    shutil.copytree(out, away)
    (away / "reshard.json").unlink()
    later(away / "config.json")
    shutil.copy2(out / "reshard.json", away)
    before = contents(away)
    with pytest.raises(reshard.WriteError, match=rf"{name} \(changed\)"):
        reshard.convert(model, away, overwrite=True)
    assert contents(away) == before


def test_nothing_is_replaced_through_a_link(model: Path, out: Path, tmp_path: Path) -> None:
    link = tmp_path / "latest"
    link.symlink_to("out")
    before = contents(out)
    with pytest.raises(reshard.WriteError, match="link to") as caught:
        reshard.convert(model, link, overwrite=True)
    assert "--overwrite" not in str(caught.value)
    assert contents(out) == before
    reshard.convert(model, out, overwrite=True)  # as the error advises


def test_what_is_added_while_the_new_output_is_written(model: Path, out: Path) -> None:
    def progress(what: str, done: int, total: int) -> None:
        (out / "notes.txt").write_text("mine", encoding="utf-8")

    with pytest.raises(reshard.WriteError, match=r"notes\.txt"):
        reshard.convert(model, out, dtype="float16", overwrite=True, progress=progress)
    assert (out / "notes.txt").read_text("utf-8") == "mine"
    assert (out / "config.json").is_file()
    assert sorted(path.name for path in out.parent.iterdir()) == ["model", "out"]


@pytest.mark.parametrize("make", [deepspeed, documents, untouched], ids=lambda make: make.__name__)
def test_a_repair_replaces_nothing_and_offers_no_flag(
    make: Callable[[Path], None], model: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = out if make is untouched else out.parent / "place"
    make(place)
    before = contents(place)
    assert run(command, ["doctor", str(model), "--repair", str(place)]) == 1
    assert "--overwrite" not in capsys.readouterr().err
    assert contents(place) == before
