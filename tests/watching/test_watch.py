"""A run that is followed: complete saves are converted once, and no other."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import reshard
from reshard.cli.app import reshard as command
from reshard.cli.app import run as run_command
from reshard.watching.saves import saves_of
from reshard.watching.state_file import STATE_FILE
from reshard.watching.watch import Event, watch
from tests.child import until
from tests.oracle.cache import Oracle

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).parents[2]
FAST = 0.02
# Trains, saves with torch's own DCP at every second step, and keeps what it saved elsewhere.
TRAINING = """
import sys, time
from pathlib import Path
import torch, torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
run, truth = map(Path, sys.argv[1:])
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(300, 400), torch.nn.ReLU(), torch.nn.Linear(400, 30))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(1, 7):
    optimizer.zero_grad()
    model(torch.randn(8, 300)).square().mean().backward()
    optimizer.step()
    if step % 2 == 0:
        save_file(model.state_dict(), truth / f"{step}.safetensors")
        dcp.save(model.state_dict(), checkpoint_id=run / f"step_{step}")
        time.sleep(0.5)
"""


def states(out: Path) -> dict[str, str]:
    """What the state file says of each save."""
    found = json.loads((out / STATE_FILE).read_text())
    return {name: state["status"] for name, state in found["saves"].items()}


def save(folder: Path, value: float) -> Path:
    """A save that is a single complete file."""
    folder.mkdir(parents=True)
    save_file({"w": np.full(3, value, np.float32)}, folder / "model.safetensors")
    return folder


def look(run: Path, out: Path, **options: Any) -> list[str]:
    """Look twice, and return what was told."""
    told: list[Event] = []
    watch(run, out, once=True, interval=FAST, listen=told.append, **options)
    return [f"{event.save} {event.message}" for event in told]


def test_a_run_that_saves_while_it_is_watched(tmp_path: Path) -> None:
    run, truth, out = (tmp_path / name for name in ("run", "truth", "out"))
    truth.mkdir()
    log = tmp_path / "log"
    then = f'echo "$RESHARD_STEP" >> {log}; test -f "$RESHARD_OUTPUT/reshard.json" && test -d'
    arguments = ["watch", run, out, "--interval", "0.2", "--keep", "2", "--then", then]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    watching = subprocess.Popen(
        [sys.executable, "-m", "reshard", *map(str, arguments)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        subprocess.run([sys.executable, "-c", TRAINING, run, truth], check=True, cwd=ROOT)
        expected = {"step_2": "removed", "step_4": "done", "step_6": "done"}
        until(lambda: (out / STATE_FILE).exists() and states(out) == expected, watching)
        assert json.loads((out / STATE_FILE).read_text())["pid"] == watching.pid
        watching.send_signal(signal.SIGTERM)
        said = watching.communicate(timeout=30)
    finally:
        watching.kill()
    assert watching.returncode == 130
    assert "Traceback" not in said[1]
    assert "watch.json says what was done; run the command again to go on." in said[1]
    assert sorted(path.name for path in out.iterdir()) == ["step_4", "step_6", STATE_FILE]
    for step in (4, 6):
        written = load_file(out / f"step_{step}" / "model.safetensors")
        kept = load_file(truth / f"{step}.safetensors")
        assert written.keys() == kept.keys()
        assert all(np.array_equal(written[name], kept[name]) for name in kept)
    assert log.read_text().split() == ["step_2", "step_4", "step_6"]
    # Once more: nothing is done twice.
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != STATE_FILE}
    assert look(run, out, then=then, keep=2) == []
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.name != STATE_FILE} == before
    assert log.read_text().split() == ["step_2", "step_4", "step_6"]


@pytest.mark.parametrize("marked", [True, False])
def test_a_save_is_not_touched_before_its_last_file(
    oracle: Oracle, marked: bool, tmp_path: Path
) -> None:
    """DeepSpeed's files appear one by one, each at first by half; `latest` is the last."""
    case, run, out = oracle["two-tags"], tmp_path / "run", tmp_path / "out"
    files = sorted(path.relative_to(case.root) for path in case.root.rglob("*") if path.is_file())
    files = [name for name in files if name.parts[0] == "global_step2"]
    if marked:
        run.mkdir()
        (run / "latest").write_text("global_step1")
        os.utime(run / "latest", (0, 0))
    for name in files:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        whole = (case.root / name).read_bytes()
        (run / name).write_bytes(whole[: len(whole) // 2])
        look(run, out)
        assert not (out / "global_step2").exists()
        (run / name).write_bytes(whole)
        if marked:
            look(run, out)
            assert not (out / "global_step2").exists()
    if marked:
        assert states(out) == {"global_step2": "waiting"}
        (run / "latest").write_text("global_step2")
    look(run, out)
    assert states(out) == {"global_step2": "done"}
    assert reshard.verify(out / "global_step2", against=case.root, tag="global_step2").num_tensors


def test_a_save_whose_files_still_change_is_left_alone(tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    folder = save(run / "checkpoint-5", 1)
    told: list[str] = []

    def listen(event: Event) -> None:
        told.append(event.message)
        if len(told) == 1:  # after the first look
            save_file({"w": np.full(3, 2, np.float32)}, folder / "model.safetensors")

    watch(run, out, once=True, interval=FAST, listen=listen)
    assert told == ["is not complete yet"]
    assert states(out) == {"checkpoint-5": "waiting"}
    look(run, out)
    assert load_file(out / "checkpoint-5" / "model.safetensors")["w"][0] == 2


def test_a_save_that_is_written_again_is_converted_again(tmp_path: Path) -> None:
    run, out, log = tmp_path / "run", tmp_path / "out", tmp_path / "log"
    then = f"echo ran >> {log}; test -d"
    folder = save(run / "step_1", 1)
    look(run, out, then=then)
    save_file({"w": np.full(3, 7, np.float32)}, folder / "model.safetensors")
    look(run, out, then=then)
    assert load_file(out / "step_1" / "model.safetensors")["w"][0] == 7
    assert log.read_text().split() == ["ran", "ran"]


def test_only_the_newest_are_converted_and_kept(tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    for step in (5, 10, 20):
        save(run / f"checkpoint-{step}", step)
    look(run, out, keep=2)
    assert states(out) == {
        "checkpoint-5": "skipped", "checkpoint-10": "done", "checkpoint-20": "done",
    }  # fmt: skip
    (out / "checkpoint-10" / "results.txt").write_text("an evaluation's")
    save(run / "checkpoint-30", 30)
    save(run / "checkpoint-40", 40)
    told = look(run, out, keep=2)
    there = sorted(path.name for path in out.iterdir() if path.is_dir())
    assert there == ["checkpoint-10", "checkpoint-30", "checkpoint-40"]
    assert states(out)["checkpoint-20"] == "removed"
    assert any("checkpoint-10 its output is kept" in line for line in told)
    assert not any("checkpoint-10" in line for line in look(run, out, keep=2))
    shutil.rmtree(run / "checkpoint-10")  # the training deletes too
    assert look(run, out, keep=2) == []


def test_a_conversion_shows_how_far_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    for step in (1, 2):
        save(run / f"step_{step}", step)
    arguments = ["watch", str(run), str(out), "--once", "--interval", str(FAST)]
    assert run_command(command, [*arguments, "--progress", "plain"]) == 0
    assert capsys.readouterr().err.count("reshard: writing 12 B") == 2
    shutil.rmtree(out)
    assert run_command(command, [*arguments, "--progress", "none"]) == 0
    assert "writing" not in capsys.readouterr().err


def test_a_command_that_failed_is_run_again_by_the_next_watch_and_nothing_else(
    tmp_path: Path,
) -> None:
    run, out, log = tmp_path / "run", tmp_path / "out", tmp_path / "log"
    save(run / "step_1", 1)
    told = look(run, out, then=f"echo ran >> {log}; exit 3 #")
    assert told[-1] == f"step_1 the command ended with 3: echo ran >> {log}; exit 3 #"
    assert states(out) == {"step_1": "failed"}
    written = (out / "step_1" / "model.safetensors").stat().st_ino
    assert look(run, out, then=f"echo ran >> {log} ; test -d") == ["step_1 the command is done"]
    assert states(out) == {"step_1": "done"}
    assert log.read_text().split() == ["ran", "ran"]
    assert (out / "step_1" / "model.safetensors").stat().st_ino == written


def test_a_save_that_fails_after_its_command_failed_does_not_count_as_converted(
    tmp_path: Path,
) -> None:
    run, out, log = tmp_path / "run", tmp_path / "out", tmp_path / "log"
    folder = save(run / "step_1", 1)
    look(run, out, then=f"echo ran >> {log}; exit 3 #")
    (folder / "model.safetensors").write_bytes(b"\x08" + b"\0" * 7 + b"no json!")
    for _ in range(2):
        look(run, out, then=f"echo ran >> {log}; test -d")
        assert states(out) == {"step_1": "failed"}
    assert log.read_text().split() == ["ran"]


def test_an_output_that_is_there_without_a_record_is_taken(tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    save(run / "step_1", 1)
    look(run, out)
    (out / STATE_FILE).unlink()
    assert look(run, out) == [
        "step_1 is not complete yet", f"step_1 is there already: {out / 'step_1'}",
    ]  # fmt: skip
    assert states(out) == {"step_1": "done"}


def test_what_cannot_be_converted_is_told_once_and_ends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    base = save(tmp_path / "base", 0)
    (base / "config.json").write_text('{"model_type": "llama"}')
    other = run / "step_1"
    other.mkdir(parents=True)
    save_file({"another": np.ones(2, np.float32)}, other / "model.safetensors")
    save(run / "step_2", 2)
    arguments = ["watch", str(run), str(out), "--base", str(base), "--interval", "0.02", "--once"]
    assert run_command(command, arguments) == 1
    shown = capsys.readouterr()
    assert shown.err.count("step_1 was not converted") == 1
    assert "step_2 is converted, verified" in shown.out
    assert states(out) == {"step_1": "failed", "step_2": "done"}
    shutil.rmtree(other)
    save(other, 1)
    assert run_command(command, [*arguments, "--quiet"]) == 0
    assert capsys.readouterr().out == ""


def test_what_is_refused_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    save(run / "step_1", 1)
    with pytest.raises(reshard.OptionError, match="one checkpoint, not the folder of a run"):
        watch(run / "step_1", out, once=True, interval=FAST)
    assert reshard.convert(run / "step_1", tmp_path / "converted").verified
    with pytest.raises(reshard.OptionError, match="there is no such option"):
        watch(run, out, once=True, bse="x")
    with pytest.raises(reshard.NotFoundError, match="no such"):
        watch(run, out, once=True, base=tmp_path / "nowhere")
    with pytest.raises(reshard.WriteError, match="the output is, or contains, the run"):
        watch(run, tmp_path, once=True)
    look(run, out)
    with pytest.raises(reshard.WriteError, match="the outputs of another run are there"):
        watch(tmp_path / "other", out, once=True, interval=FAST)
    save(tmp_path / "other" / "step_1", 3)
    look(tmp_path / "other", tmp_path / "another")
    assert states(tmp_path / "another") == {"step_1": "done"}
    (out / STATE_FILE).write_text("{")
    with pytest.raises(reshard.FormatError, match=r"watch\.json: it is damaged.*Remove it"):
        watch(run, out, once=True, interval=FAST)
    (out / STATE_FILE).unlink()
    look(run, out)
    save(run / "b" / "step_2", 2)
    with pytest.raises(reshard.NotFoundError, match="saves of several models or runs"):
        watch(run, out, once=True, interval=FAST)
    for flags in (["--keep", "0"], ["--interval", "-1"], ["--then", ""]):
        assert run_command(command, ["watch", str(run), str(out), "--once", *flags]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_two_watches_do_not_write_into_one_folder(tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    save(run / "step_1", 1)
    refused: list[str] = []

    def listen(event: Event) -> None:
        try:
            watch(run, out, once=True, interval=FAST)
        except reshard.WriteError as error:
            refused.append(str(error))

    watch(run, out, once=True, interval=FAST, listen=listen)
    assert refused
    assert not (out / ".watch.lock").exists()


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["checkpoint-9/pytorch_model_fsdp_0", "checkpoint-10/pytorch_model_fsdp_0"],
         ["checkpoint-9", "checkpoint-10"]),
        (["qwen2.5-7b/global_step_2/actor", "qwen2.5-7b/global_step_10/actor"],
         ["global_step_2", "global_step_10"]),
        (["_actor/global_step4", "_critic/global_step4"], ["global_step4"]),
        (["5", "40"], ["5", "40"]),
    ],
)  # fmt: skip
def test_saves_are_called_by_their_steps(
    paths: list[str], names: list[str], tmp_path: Path
) -> None:
    for path in paths:
        save(tmp_path / path, 1)
    assert [found.name for found in saves_of(tmp_path)] == names
