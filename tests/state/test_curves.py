"""An unbroken curve: N steps in one framework, converted, N more in another at another world size.

Three things are asked of each move. What the second framework holds after loading is what the first
one held, bit for bit. The losses that follow are those of a run without a stop. And so are the
final weights: to 1e-5 of their largest, or as closely as the second framework comes to them that
saves and loads its own, since sums of another number of ranks round otherwise.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file

import reshard
from tests.state.conftest import Ranks
from tests.state.jobs import Engine, Job, Layout, Place, Result

N = 3
TOLERANCE = 1e-5
# bfloat16 sums on a CPU depend on what the process did before, and on the number of ranks.
TOLERANCE_BF16 = 5e-4
ROOT = Path(__file__).parents[2]


class Move(msgspec.Struct, frozen=True):
    """From a run of `source` to one of `target`, each an engine with a number of ranks.

    `saved` and `loaded` are the layouts on either side, `model` the other settings of both runs.
    """

    source: tuple[Engine, int]
    saved: Layout
    target: tuple[Engine, int]
    loaded: Layout
    model: dict[str, Any] = {}
    repaired: bool = False

    @property
    def name(self) -> str:
        ends = [f"{engine} x {ranks}" for engine, ranks in (self.source, self.target)]
        told = "".join(f", {key} {value}" for key, value in self.model.items())
        return f"{ends[0]} {self.saved} to {ends[1]} {self.loaded}{told}"


HAVE_CLIENT_STATE = ("deepspeed", "lightrft", "universal")
ONE = {"groups": 1, "frozen": False}
FLAT = {**ONE, "wrapped": True, "flat": True}
LORA = {"kind": "lora"}
QUICK = (
    Move(("zero2", 2), "deepspeed", ("fsdp2", 3), "lightrft"),
    Move(("zero2", 2), "deepspeed", ("zero3", 3), "universal", {}, True),
    Move(("fsdp2", 3), "lightrft", ("zero3", 2), "universal", ONE),
    Move(("zero3", 2), "deepspeed", ("zero1", 3), "universal"),
    Move(("fsdp1", 2), "accelerate", ("fsdp2", 3), "accelerate"),
    Move(("zero2", 2), "deepspeed", ("fsdp2", 2), "lightrft", LORA),
    Move(("fsdp2", 2), "nested", ("fsdp2", 3), "lightrft", {"every": True}),
)
SLOW = (
    Move(("fsdp2", 3), "lightrft", ("zero2", 2), "universal"),
    Move(("zero3", 2), "deepspeed", ("zero1", 1), "universal"),
    Move(("fsdp2", 3), "accelerate", ("zero2", 2), "universal", LORA),
    Move(("fsdp2", 2), "full", ("zero2", 3), "universal"),
    Move(("zero2", 2), "deepspeed", ("fsdp2", 3), "torchtitan"),
    Move(("zero1", 3), "deepspeed", ("fsdp1", 2), "nested", {"kind": "llama"}),
    Move(("zero3", 3), "deepspeed", ("fsdp2", 2), "accelerate", {"kind": "llama"}),
    Move(("zero3", 2), "deepspeed", ("fsdp2", 3), "nested"),
    Move(("fsdp2", 2), "nested", ("zero1", 3), "universal", {"kind": "llama"}),
    Move(("fsdp2", 2), "flat", ("zero2", 1), "universal"),
    Move(("fsdp1", 2), "accelerate", ("zero3", 3), "universal", ONE),
    Move(("fsdp2", 3), "accelerate", ("fsdp2", 2), "lightrft"),
    Move(("fsdp1", 2), "verl", ("fsdp2", 3), "lightrft", FLAT),
    Move(("fsdp1", 3), "ranks", ("zero2", 2), "universal", FLAT),
    Move(("fsdp2", 2), "ranks", ("zero1", 3), "universal"),
    Move(("zero0", 2), "deepspeed", ("fsdp2", 3), "lightrft", ONE),
    Move(("zero0", 2), "deepspeed", ("zero2", 3), "universal", ONE),
)
BFLOAT16 = (
    Move(("zero2", 2), "deepspeed", ("fsdp2", 2), "lightrft", {"precision": "bfloat16"}),
    Move(("zero2", 2), "deepspeed", ("zero1", 2), "universal", {"precision": "bfloat16"}),
)


class Done(msgspec.Struct):
    """A move and its runs: without a stop, before and after; the target's own save and load."""

    move: Move
    folder: Path
    fixes: tuple[str, ...] = ()

    def result(self, run: str, when: str = "end") -> Result:
        return msgspec.json.decode((self.folder / run / f"{when}.json").read_bytes(), type=Result)

    def tensors(self, run: str, when: str = "end") -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = load_file(self.folder / run / f"{when}.safetensors")
        return found

    def losses_apart(self, run: str) -> float:
        """The largest difference to the losses without a stop, of the steps after the move."""
        whole = self.result("whole").losses[N:]
        found = self.result(run).losses[-N:]
        return max(abs(a / b - 1) for a, b in zip(found, whole, strict=True))

    def weights_apart(self, run: str) -> float:
        """The largest difference to the final weights without a stop, by each tensor's largest."""
        whole, found = self.tensors("whole"), self.tensors(run)
        names = [name for name in whole if name.startswith("param.")]
        assert {*names} == {name for name in found if name.startswith("param.")}
        apart = [(found[n] - whole[n]).abs().max() / whole[n].abs().max() for n in names]
        return max(float(value) for value in apart)


def carry_out(ranks: Ranks, folder: Path, moves: tuple[Move, ...]) -> list[Done]:
    """All runs of the moves: those before together, then the conversions, then those after."""
    done = [Done(move, folder / str(number)) for number, move in enumerate(moves)]
    first, second = [], []
    for one in done:
        move = one.move
        engine, world = move.source
        base = Job(engine, world, str(one.folder / "before"), (1, N + 1), **move.model)
        saved = Place(str(one.folder / "saved"), move.saved)
        first.append(replace(base, save=saved))
        first.append(replace(base, out=str(one.folder / "whole"), steps=(1, 2 * N + 1)))
        engine, world = move.target
        own: Layout = "deepspeed" if engine.startswith("zero") else "lightrft"
        kept = Place(str(one.folder / "own"), own)
        base = replace(base, engine=engine, world=world)
        first.append(replace(base, out=str(one.folder / "control"), save=kept))
        second.append(_after(replace(base, out=str(one.folder / "reloaded")), kept))
        moved = Place(str(one.folder / "moved"), move.loaded)
        job = _after(replace(base, out=str(one.folder / "after"), spoilt=True), moved)
        second.append(replace(job, after=after_loading() if move.repaired else ""))
    known: dict[Job, Job] = {}
    ranks.run(*_once(first, known))
    for one in done:
        convert(one)
    ranks.run(*_once(second, known))
    return done


def _once(jobs: list[Job], known: dict[Job, Job]) -> list[Job]:
    """The jobs without those that are the same as one before, whose folders become links to it."""
    fresh = []
    for job in jobs:
        load = job.load and replace(job.load, folder=os.path.realpath(job.load.folder))
        same = replace(job, out="", load=load, save=job.save and replace(job.save, folder=""))
        first = known.setdefault(same, job)
        if first is job:
            fresh.append(job)
            continue
        Path(job.out).parent.mkdir(parents=True, exist_ok=True)
        Path(job.out).symlink_to(first.out)
        if job.save is not None and first.save is not None:
            Path(job.save.folder).symlink_to(first.save.folder)
    return fresh


def _after(job: Job, place: Place) -> Job:
    return replace(job, load=place, steps=(N + 1, 2 * N + 1))


def convert(one: Done) -> None:
    """The conversion that a move is about; what its findings say to do is kept."""
    options: dict[str, Any] = {"to": "deepspeed"}
    if one.move.loaded != "universal":
        options = {"to": "dcp", "optimizer": True, "layout": one.move.loaded}
    report = reshard.convert(one.folder / "saved", one.folder / "moved", **options)
    one.fixes = tuple(found.to_json()["fix"] for found in report.findings)


def after_loading() -> str:
    """The lines for stage 3 that the documentation gives."""
    page = (ROOT / "docs" / "training-state.md").read_text("utf-8")
    (lines,) = re.findall(r"```python\n(import torch\n.*?)```", page, flags=re.DOTALL)
    return str(lines)


def check(one: Done, tolerance: float) -> None:
    """The state arrived whole, and the run goes on as if nothing had been."""
    before, start = one.tensors("before"), one.tensors("after", "start")
    both = before.keys() & start.keys()
    assert len([name for name in both if name.startswith("param.")]) > 5
    assert len(both) in (len(before), len(start))  # FSDP1's moments cannot be gathered
    for name in both:
        assert torch.equal(start[name], before[name]), name
    assert one.result("after", "start").steps == one.result("before").steps
    if one.move.saved in HAVE_CLIENT_STATE and one.move.loaded in HAVE_CLIENT_STATE:
        assert one.result("after", "start").client == {"consumed_samples": 18}
    assert one.losses_apart("after") <= max(tolerance, 2 * one.losses_apart("reloaded"))
    assert one.weights_apart("after") <= max(tolerance, 2 * one.weights_apart("reloaded"))


@pytest.fixture(scope="module")
def quick(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> list[Done]:
    """The quick moves, carried out."""
    return carry_out(ranks, tmp_path_factory.mktemp("quick"), QUICK)


@pytest.mark.parametrize("number", range(len(QUICK)), ids=[move.name for move in QUICK])
def test_the_curve_is_unbroken(quick: list[Done], number: int) -> None:
    check(quick[number], TOLERANCE)


STAGE3 = "Load it with ZeRO stage 1 or 2, or run the code in docs/training-state.md after loading."
GROUPS = "Create the script's parameter groups in this order."
FROZEN = "Start the script with the weights that the run started from."


@pytest.mark.parametrize(
    ("fix", "numbers"),
    [
        (STAGE3, (1, 3)),  # loaded by stage 3, with the lines; and by stage 2
        (GROUPS, (1, 3)),  # the script makes the run's two groups
        (FROZEN, (1, 3)),  # the script starts from the run's weights, one of which is frozen
    ],
)
def test_a_run_that_does_what_a_finding_says(
    quick: list[Done], fix: str, numbers: tuple[int, ...]
) -> None:
    for number in numbers:
        assert fix in quick[number].fixes
        check(quick[number], TOLERANCE)


@pytest.mark.slow
def test_every_other_way(ranks: Ranks, tmp_path: Path) -> None:
    for one in carry_out(ranks, tmp_path, SLOW):
        check(one, TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("move", BFLOAT16, ids=[move.name for move in BFLOAT16])
def test_bfloat16_with_masters(ranks: Ranks, tmp_path: Path, move: Move) -> None:
    check(carry_out(ranks, tmp_path, (move,))[0], TOLERANCE_BF16)
