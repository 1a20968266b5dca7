"""FSDP1's optimizers in files of each rank, flattened or by names; FSDP2's beside them.

Real runs on three ranks, and on two times two; what the ranks held is gathered from the live
optimizers, by FSDP1's own tables of its flat parameters.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file

import reshard
from reshard.errors import FormatError, IncompleteError, UnsupportedError, VerificationError
from reshard.formats.rank_files.units import units_in_order
from tests.state import model as models
from tests.state.cases import Opened, opened
from tests.state.conftest import Ranks
from tests.state.jobs import Job, Layout, Place
from tests.state.test_refusals import refused, weights_alone
from tests.state.test_writing import loaded
from tests.tensors import raw

FLAT = Job("fsdp1", 3, "", (1, 3), groups=1, frozen=False, wrapped=True, flat=True)
RUNS: dict[str, tuple[Job, tuple[Layout, ...]]] = {
    "flat": (FLAT, ("verl", "ranks", "script")),
    "slices": (
        Job("fsdp1", 3, "", (1, 3), wrapped=True, frozen=False),
        ("verl", "ranks", "ids", "accelerate", "local"),
    ),
    "hybrid": (replace(FLAT, world=4, hybrid=True), ("verl",)),
    "frozen": (Job("fsdp1", 3, "", (1, 3), wrapped=True), ("verl", "ranks")),
    "fsdp2": (Job("fsdp2", 3, "", (1, 3)), ("ranks", "script")),
}
# A frozen matrix between trained ones of as many elements: lengths alone do not tell them apart.
UNTOLD = ("frozen", "verl")
CASES = [(n, layout) for n, (_, layouts) in RUNS.items() for layout in layouts]
CASES.remove(UNTOLD)  # type: ignore[arg-type]
CASES.remove(("slices", "ids"))
CASES.remove(("slices", "local"))


@pytest.fixture(scope="module")
def runs(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of each run, saved in each of its layouts: `<run>/<layout>`."""
    root = tmp_path_factory.mktemp("fsdp1")
    jobs = []
    for name, (job, layouts) in RUNS.items():
        places = tuple(Place(str(root / name / layout), layout) for layout in layouts)
        jobs.append(replace(job, out=str(root / name / "live"), more=places))
    ranks.run(*jobs)
    return root


def live(runs: Path, name: str) -> dict[str, torch.Tensor]:
    """`exp_avg.NAME` and the like -> what the ranks held together."""
    found: dict[str, torch.Tensor] = load_file(runs / name / "live" / "end.safetensors")
    return {key: value for key, value in found.items() if not key.startswith("param.")}


def check(found: Opened, want: dict[str, torch.Tensor]) -> None:
    state = found.state
    got = {entry.spec.name: found.stored(entry) for entry in state.entries(masters=False)}
    assert got.keys() == want.keys()
    assert len(got) >= 50
    for key, value in want.items():
        assert got[key].data == raw(value), key
        assert got[key].shape == tuple(value.shape), key
    assert {step.count for step in state.steps.values()} == {2}
    assert state.steps.keys() == {name.partition(".")[2] for name in want}


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_every_moment_is_the_live_optimizers(name: str, layout: str, runs: Path) -> None:
    with opened(runs / name / layout) as found:
        check(found, live(runs, name))
        codes = [finding.code for finding in found.state.findings]
        assert ("state-named-by-order" in codes) == (layout in ("verl", "script"))
        assert found.state.scheduler is not None


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(("name", "layout"), CASES)
def test_it_is_carried_to_either_framework(
    name: str, layout: str, runs: Path, tmp_path: Path
) -> None:
    source, want = runs / name / layout, live(runs, name)
    assert reshard.convert(source, tmp_path / "dcp", to="dcp", optimizer=True).verified
    written = loaded(tmp_path / "dcp" / "optim_states")["state"]
    for key, value in want.items():
        kind, _, parameter = key.partition(".")
        assert torch.equal(written[parameter][kind], value), key
    assert reshard.verify(tmp_path / "dcp", against=source).num_tensors >= 2 * len(written)
    assert reshard.convert(source, tmp_path / "universal", to="deepspeed").verified
    with opened(tmp_path / "universal") as found:
        check(found, want)


@pytest.mark.parametrize("name", ["flat", "slices"])
def test_a_rank_is_missing(name: str, runs: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs / name / "verl", tmp_path / "run"))
    lost = run / "optim_world_size_3_rank_2.pt"
    lost.rename(tmp_path / "kept")
    assert "file of rank 2 is missing" in str(refused(run, IncompleteError))
    (tmp_path / "kept").rename(lost)
    with opened(run) as found:
        assert found.state.names


def test_a_sharded_optimizer_beside_local_state_dicts(runs: Path, tmp_path: Path) -> None:
    """As accelerate saves FSDP1 with LOCAL_STATE_DICT: files of ranks, and a folder of DCP's."""
    run = runs / "slices" / "local"
    assert (run / "pytorch_model_fsdp_rank0.bin").is_file()
    assert (run / "optimizer_0" / ".metadata").is_file()
    error = refused(run, UnsupportedError)
    assert str(error.path) == str(run / "optimizer_0")
    assert "another kind of save than the model's" in str(error)
    assert error.hint == "Convert the weights alone, without --optimizer."
    for to in ("dcp", "deepspeed"):
        with pytest.raises(UnsupportedError, match="another kind of save"):
            reshard.convert(run, tmp_path / "out", to=to, optimizer=True)
        assert not (tmp_path / "out").exists()
    models.build("qwen2", frozen=False).save_pretrained(tmp_path / "base")
    reshard.convert(run, tmp_path / "out", base=tmp_path / "base")  # as the hint says
    written: dict[str, torch.Tensor] = load_file(tmp_path / "out" / "model.safetensors")
    held = load_file(runs / "slices" / "live" / "end.safetensors")
    want = {n.removeprefix("param."): v for n, v in held.items() if n.startswith("param.")}
    assert written.keys() == want.keys()
    assert [name for name, value in want.items() if not torch.equal(written[name], value)] == []


@pytest.mark.parametrize("wrong", ["missing", "steps"])
def test_a_scripts_ranks_that_do_not_fit(wrong: str, runs: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs / "fsdp2" / "script", tmp_path / "run"))
    path = run / "optim_rank1.pt"
    if wrong == "missing":
        path.unlink()
        assert "file of rank 1 is missing" in str(refused(run, IncompleteError))
        return
    content = torch.load(path, weights_only=False)
    for state in content["state"].values():
        state["step"] += 1
    torch.save(content, path)
    assert "groups or steps are not those" in str(refused(run, FormatError))


def test_whole_tensors_in_several_ranks_files_without_names(tmp_path: Path) -> None:
    """As a DDP script's: by numbers, nothing says that the ranks' tensors are the same."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    for rank in range(2):
        torch.save(model.state_dict(), tmp_path / f"model_rank{rank}.pt")
        torch.save(optimizer.state_dict(), tmp_path / f"optim_rank{rank}.pt")
    error = refused(tmp_path, UnsupportedError)
    assert "no file says how the ranks share it" in str(error)
    weights_alone(tmp_path, tmp_path.with_name("out"))


def test_what_fsdp1_gathers_by_numbers(runs: Path, tmp_path: Path) -> None:
    """torch 2.13 gathers the mean of squares in the mean's place, too; that is noticed."""
    run = Path(shutil.copytree(runs / "slices" / "ids", tmp_path / "run"))
    with pytest.raises(VerificationError, match=r"equals exp_avg_sq.* bit for bit") as caught:
        reshard.convert(run, tmp_path / "out", to="dcp", optimizer=True)
    assert "save with SHARDED_STATE_DICT" in str(caught.value.hint)
    sharded = runs / "slices" / "accelerate"
    assert reshard.convert(sharded, tmp_path / "out", to="dcp", optimizer=True).verified
    # With the means that the ranks held, numbers get their names by the order.
    content = torch.load(run / "optimizer.pt")
    want = live(runs, "slices")
    numbers = content["param_groups"]
    state = torch.load(runs / "slices" / "live" / "numbers.pt")
    assert sum(len(group["params"]) for group in numbers) == len(state)
    for number, name in state.items():
        assert torch.equal(content["state"][number]["exp_avg_sq"], want[f"exp_avg_sq.{name}"])
        content["state"][number]["exp_avg"] = want[f"exp_avg.{name}"]
    torch.save(content, run / "optimizer.pt")
    with opened(run) as found:
        check(found, want)
        assert [finding.code for finding in found.state.findings] == ["state-named-by-order"]


def resaved(run: Path, edit: Any) -> None:
    """Every rank's optimizer, changed."""
    for path in run.glob("optim*"):
        content = torch.load(path, weights_only=False)
        edit(content)
        torch.save(content, path)


def test_lengths_that_fit_no_module(runs: Path, tmp_path: Path) -> None:
    def swap(content: dict[str, Any]) -> None:
        state = content["state"]
        state[0], state[1] = state[1], state[0]

    run = Path(shutil.copytree(runs / "flat" / "verl", tmp_path / "run"))
    resaved(run, swap)
    for untold, saved in (
        (run, runs / "flat" / "ranks"),
        (runs.joinpath(*UNTOLD), runs / "frozen" / "ranks"),
    ):
        error = refused(untold, UnsupportedError)
        assert "flattened, as FSDP1 keeps it" in str(error)
        assert str(error.hint).startswith("Save it with FSDP.optim_state_dict")
        with opened(saved) as found:  # as the hint says
            assert found.state.names
    weights_alone(run, tmp_path)


@pytest.mark.parametrize("name", ["flat", "slices"])
def test_a_number_of_no_group(name: str, runs: Path, tmp_path: Path) -> None:
    def beyond(content: dict[str, Any]) -> None:
        content["state"][999] = {"exp_avg": torch.ones(7)}

    run = Path(shutil.copytree(runs / name / "verl", tmp_path / "run"))
    resaved(run, beyond)
    assert "cannot tell which parameters" in str(refused(run, UnsupportedError))


def test_ranks_that_should_hold_the_same(runs: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs / "hybrid" / "verl", tmp_path / "run"))
    path = run / "optim_world_size_4_rank_3.pt"
    content = torch.load(path, weights_only=False)
    content["state"][1]["exp_avg"][5] += 1
    torch.save(content, path)
    assert "must equal the copy in" in str(refused(run, reshard.FormatError))


def test_names_that_the_optimizer_was_given(tmp_path: Path) -> None:
    """`AdamW(model.named_parameters())`: torch keeps the names in the groups."""
    model = torch.nn.ModuleDict({name: torch.nn.Linear(3, 3) for name in ("a", "b", "c")})
    named = list(model.named_parameters())
    optimizer = torch.optim.AdamW([{"params": named[::-2]}, {"params": named[::2], "lr": 0.1}])
    model["b"](model["a"](model["c"](torch.randn(2, 3)))).sum().backward()
    optimizer.step()
    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "x.pt"
    )
    with opened(tmp_path / "x.pt") as found:
        assert found.state.findings == ()
        for name, parameter in named:
            for kind in ("exp_avg", "exp_avg_sq"):
                held = found.stored(found.state.moments[kind][name])
                assert held.data == raw(optimizer.state[parameter][kind])


@pytest.mark.parametrize(
    ("sizes", "parts", "want"),
    [
        ([12, 8, 8], 2, [["e", "n"], ["a.q", "a.u"], ["b.q", "b.u"]]),
        ([26], 2, [["e", "a.q", "a.u", "b.q", "b.u", "n"]]),
        ([12, 8], 2, None),  # either module
        ([11, 7, 7], 1, [["e", "n"], ["a.q", "a.u"], ["b.q", "b.u"]]),
        ([12, 8, 10], 2, None),
        ([], 2, None),
    ],
)
def test_units(sizes: list[int], parts: int, want: list[list[str]] | None) -> None:
    model = {"e": 9, "a.q": 4, "a.u": 3, "b.q": 4, "b.u": 3, "n": 2}
    assert units_in_order(sizes, parts, model) == want


def test_every_parameter_is_of_a_module_that_is_wrapped() -> None:
    assert units_in_order([4, 6], 2, {"a.q": 4, "b.q": 5}) == [["a.q"], ["b.q"]]
