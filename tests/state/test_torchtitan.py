"""Training states under torchtitan's names: from its models into DeepSpeed, and back.

A run of FSDP2 is put under torchtitan's names by the formulas of its converters, moments like
weights; the real DeepSpeed loads what reshard makes of it. On the way back torch's own functions
load what reshard writes into models with the names of either version.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint import state_dict as sd

import reshard
from reshard.errors import OptionError, PlanError
from tests.naming.test_titan import _DENSE, _LAYER, _NAMES, turned_back
from tests.state import model as models
from tests.state.conftest import Ranks
from tests.state.jobs import Job, Place
from tests.state.test_writing import loaded

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
# 0: torchtitan 0.3; 1: its checkpoints of 2025.
ERAS = (0, 1)
KINDS = ("exp_avg", "exp_avg_sq")
State = dict[str, torch.Tensor]
HEADS = {"q_proj": 2, "k_proj": 1}


def titans(hub: str, era: int) -> str:
    """What torchtitan calls a parameter."""
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", hub)
    if layer is None:
        return _NAMES[hub][era]
    return f"layers.{layer[1]}.{(_LAYER | _DENSE)[layer[2]][era]}"


def turned(hub: str, value: torch.Tensor) -> torch.Tensor:
    """Its rows as torchtitan has them."""
    heads = next((n for part, n in HEADS.items() if f"{part}.weight" in hub), None)
    return value if heads is None else turned_back(value, heads)


class Run:
    """Two steps of FSDP2 with two groups and a frozen matrix, and the model that it began from."""

    def __init__(self, root: Path) -> None:
        self.base, self.saved, self.out = root / "base", root / "saved", root / "live"
        self.job = Job(
            "fsdp2", 2, str(self.out), (1, 3), save=Place(str(self.saved), "nested"), kind="llama"
        )
        models.build("llama").save_pretrained(self.base)

    def live(self) -> State:
        """`param.NAME`, `exp_avg.NAME` and the like, as the ranks held them."""
        found: State = load_file(self.out / "end.safetensors")
        return found

    def in_files(self, folder: Path) -> Path:
        """Its save as a Hugging Face folder with `optimizer.bin`, as of FULL_STATE_DICT."""
        content = loaded(self.saved)
        shutil.copytree(self.base, folder)
        weights = {n: v for n, v in content["model"].items() if n != "lm_head.weight"}
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        torch.save(content["optimizer"], folder / "optimizer.bin")
        return folder

    def of_titan(self, era: int) -> dict[str, Any]:
        """Its save under torchtitan's names, flattened as torchtitan does."""
        content = loaded(self.saved)
        weights = {n: v for n, v in content["model"].items() if n != "lm_head.weight"}
        found: dict[str, Any] = {titans(n, era): turned(n, v) for n, v in weights.items()}
        state = found["optimizer"] = {}
        for name, held in content["optimizer"]["state"].items():
            for kind, value in held.items():
                moment = turned(name, value) if value.dim() == 2 else value
                state[f"state.{titans(name, era)}.{kind}"] = moment
        for group in content["optimizer"]["param_groups"]:
            for name in group["params"]:
                for key, value in group.items():
                    if key != "params":
                        state[f"param_groups.{titans(name, era)}.{key}"] = value
        return found


@pytest.fixture(scope="module")
def run(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Run:
    found = Run(tmp_path_factory.mktemp("titan"))
    ranks.run(found.job)
    return found


def test_deepspeed_goes_on_with_torchtitans_moments(run: Run, ranks: Ranks, tmp_path: Path) -> None:
    """They come by the hub's names, queries' and keys' rows in the hub's order."""
    jobs = []
    for era in ERAS:
        source, out = tmp_path / f"titan{era}", tmp_path / f"moved{era}"
        dcp.save(run.of_titan(era), checkpoint_id=source, no_dist=True)
        assert reshard.convert(source, out, to="deepspeed", base=run.base).verified
        assert reshard.verify(out, against=source, base=run.base).num_tensors
        load = Place(str(out), "universal")
        folder = str(tmp_path / f"went{era}")
        jobs.append(
            Job("zero2", 2, folder, (3, 4), load=load, kind="llama", spoilt=True, schedule=False)
        )
    ranks.run(*jobs)
    before = run.live()
    assert any(".q_proj." in name for name in before)
    for job in jobs:
        after = load_file(Path(job.out) / "start.safetensors")
        assert after.keys() == before.keys()
        assert [name for name, value in before.items() if not torch.equal(after[name], value)] == []
        result = json.loads((Path(job.out) / "start.json").read_text())
        assert result["steps"] == [2.0]


class Named(nn.Module):  # type: ignore[misc]  # torch is untyped here
    """A model of parameters with these names, and nothing else."""

    def __init__(self, shapes: Iterable[tuple[str, torch.Size]]) -> None:
        super().__init__()
        for name, shape in shapes:
            *path, last = name.split(".")
            place: nn.Module = self
            for step in path:
                if step not in dict(place.named_children()):
                    place.add_module(step, nn.Module())
                place = place.get_submodule(step)
            place.register_parameter(last, nn.Parameter(torch.zeros(shape)))


def torch_loads(folder: Path, content: dict[str, Any]) -> tuple[State, dict[str, Any]]:
    """The weights and the optimizer's state that a model of torchtitan's names takes from a save,
    as torchtitan loads it (dcp.load, flattened, set_optimizer_state_dict)."""
    weights = {n: v for n, v in content.items() if isinstance(v, torch.Tensor)}
    model = Named((name, value.shape) for name, value in weights.items())
    named = dict(model.named_parameters())
    second = [p for p in named.values() if p.dim() == 1]
    held = [name for name in weights if f"state.{name}.step" in content["optimizer"]]
    first = [named[name] for name in held if named[name].dim() == 2]
    optimizer = torch.optim.AdamW([{"params": first}, {"params": second}], lr=0.3)
    for group in optimizer.param_groups:  # as a scheduler sets it
        group["initial_lr"] = 0.3
    options = sd.StateDictOptions(flatten_optimizer_state_dict=True)
    both = {
        **{name: parameter.detach() for name, parameter in named.items()},
        "optimizer": sd.get_optimizer_state_dict(model, optimizer, options=options),
    }
    dcp.load(both, checkpoint_id=folder, no_dist=True)
    sd.set_optimizer_state_dict(model, optimizer, both["optimizer"], options=options)
    names = {id(parameter): name for name, parameter in named.items()}
    state = {names[id(p)]: dict(s) for p, s in optimizer.state.items()}
    settings = {
        names[id(p)]: {k: v for k, v in group.items() if k != "params"}
        for group in optimizer.param_groups
        for p in group["params"]
    }
    return dict(named), {"state": state, "settings": settings}


@pytest.mark.parametrize("with_base", [True, False])
def test_torch_loads_them_into_models_of_either_version(
    with_base: bool, run: Run, tmp_path: Path
) -> None:
    """And reshard reads them back: under the hub's names they are the source's."""
    source, out = run.saved, tmp_path / "titan"
    options: dict[str, Any] = {"base": run.base} if with_base else {}
    if not with_base:  # a folder that has the config: the model's files, the optimizer's beside
        source = run.in_files(tmp_path / "source")
    report = reshard.convert(source, out, to="dcp", optimizer=True, names="torchtitan", **options)
    assert report.verified
    for era in ERAS:
        want = run.of_titan(era)
        weights, optimizer = torch_loads(out, want)
        for name, value in weights.items():
            assert torch.equal(value.detach(), want[name]), name
        flat = {
            f"state.{name}.{kind}": value
            for name, held in optimizer["state"].items()
            for kind, value in held.items()
        }
        states = {key: v for key, v in want["optimizer"].items() if key.startswith("state.")}
        assert flat.keys() == states.keys()
        assert len(flat) > 50
        assert [key for key, value in states.items() if not torch.equal(flat[key], value)] == []
        for name, settings in optimizer["settings"].items():
            for key, value in settings.items():
                if f"param_groups.{name}.{key}" in want["optimizer"]:
                    assert value == want["optimizer"][f"param_groups.{name}.{key}"], (name, key)
    assert reshard.verify(out, against=source, base=run.base).num_tensors
    back = tmp_path / "back"
    assert reshard.convert(out, back, to="dcp", optimizer=True, base=run.base).verified
    content, live = loaded(back / "optim_states"), run.live()
    trained = {name.partition(".")[2] for name in live if name.startswith("exp_avg.")}
    assert content["state"].keys() == trained
    for name, held in content["state"].items():
        for kind in KINDS:
            assert torch.equal(held[kind], live[f"{kind}.{name}"]), (kind, name)
    first = loaded(run.saved)["optimizer"]["param_groups"]
    assert sorted(map(_settings, content["param_groups"]), key=repr) == sorted(
        map(_settings, first), key=repr
    )


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {**group, "params": sorted(group["params"])}


def test_another_layout_is_refused(run: Run, tmp_path: Path) -> None:
    convert: Callable[..., Any] = reshard.convert
    asked: dict[str, Any] = {
        "to": "dcp", "optimizer": True, "names": "torchtitan", "base": run.base
    }  # fmt: skip
    with pytest.raises(OptionError, match="is written with --layout torchtitan") as caught:
        convert(run.saved, tmp_path / "out", layout="nested", **asked)
    assert caught.value.hint == "Pass --layout torchtitan, or leave out --layout."
    for layout in ({"layout": "torchtitan"}, {}):
        assert convert(run.saved, tmp_path / f"out{len(layout)}", **asked, **layout).verified


def test_moments_of_some_experts_of_a_stack(tmp_path: Path) -> None:
    """torchtitan has one tensor of all of a layer's experts: it cannot have moments of a part."""
    from tests.naming.test_titan import base_of, made

    hub, _ = made("qwen3_moe", 0)
    base = base_of(hub, tmp_path / "base", "qwen3_moe")
    state = {n: {"step": torch.tensor(2.0), **{k: v.abs() * 0.5**at for at, k in enumerate(KINDS)}}
             for n, v in hub.items()}  # fmt: skip

    def save(folder: Path, names: list[str]) -> Path:
        group = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "params": names}
        optimizer = {"state": {n: state[n] for n in names}, "param_groups": [group]}
        dcp.save({"model": hub, "optimizer": optimizer}, checkpoint_id=folder, no_dist=True)
        return folder

    asked: dict[str, Any] = {"to": "dcp", "optimizer": True, "names": "torchtitan", "base": base}
    some = [name for name in hub if ".experts.1." not in name]
    with pytest.raises(PlanError, match="with and without an optimizer's state") as caught:
        reshard.convert(save(tmp_path / "some", some), tmp_path / "out", **asked)
    assert caught.value.hint == "Convert the weights alone, without --optimizer."
    assert reshard.convert(save(tmp_path / "all", list(hub)), tmp_path / "out", **asked).verified
    found = loaded(tmp_path / "out")["optimizer"]
    for kind in KINDS:
        stack = torch.stack(
            [state[f"model.layers.1.mlp.experts.{at}.up_proj.weight"][kind] for at in range(3)]
        )
        for name in ("moe.routed_experts.inner_experts.w3_EFD", "moe.experts.w3"):
            assert torch.equal(found[f"state.layers.1.{name}.{kind}"], stack)
