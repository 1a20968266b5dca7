"""Lay out a model and its optimizer as the frameworks load them with `dcp.load`. Pure, no I/O.

    lightrft     .metadata, __0_<n>.distcp                    {name: weight}
                 optim_states/                                {"state": .., "param_groups": ..}
                 client_state.pt, scheduler_state.pt
    accelerate   pytorch_model_fsdp_0/                        {"model": {name: weight}}
                 optimizer_0/                                 {"optimizer": {"state": ..}}
                 scheduler.pt
    nested       .metadata, __0_<n>.distcp, __1_<n>.distcp    {"model": .., "optimizer": ..}
                 scheduler.pt
    torchtitan   the same files            {name: weight, "optimizer": {"state.<name>.exp_avg": ..,
                                            "param_groups.<name>.lr": ..}, "lr_scheduler": ..}

The optimizer's part is what `get_optimizer_state_dict` returns: moments by parameter name, each
step a float32 tensor without dimensions, each hyperparameter a separate object, and `params` of a
group the names. Flattened, each parameter has its group's hyperparameters. Frozen parameters and
tied aliases have no state; under torchtitan's names a parameter's state goes by those of all its
versions (`TrainingState.aliases`), which are names of the same bytes. torch 2.13
(checkpoint/state_dict.py), accelerate 1.15 (utils/fsdp_utils.py), LightRFT
(strategy/fsdp/fsdpv2.py, `load_ckpt`), torchtitan 0.3.0 (components/optimizer/utils.py,
components/checkpointer/dcp.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from msgspec import Struct
from msgspec.structs import replace

from reshard.containers.dcp.layout import Section, lay_out_sections
from reshard.containers.dcp.pickling import StatePath
from reshard.containers.torch.optimizer import step_tensor
from reshard.containers.torch.write import TensorBytes, lay_out_data
from reshard.core.dtypes import INT32, INT64
from reshard.core.findings import Finding
from reshard.core.hyperparameters import joined
from reshard.core.state import STATE_TABLE, Plain, TrainingState, tensor_name
from reshard.core.tensors import TensorSpec
from reshard.errors import listed
from reshard.formats import Laid, TensorToWrite
from reshard.formats.dcp.lightrft import CLIENT_STATE, CONSUMED_SAMPLES

#: The values of `--layout`, the default first.
LAYOUTS = ("lightrft", "accelerate", "nested", "torchtitan")


class _Place(Struct, frozen=True):
    """Where a layout keeps the parts: folders, and keys in the state dict; and small files.

    `flattened`: hyperparameters by parameter; the schedule and counters are keys of the save.
    """

    model_folder: str
    model_root: StatePath
    state_folder: str
    state_root: StatePath
    scheduler: str
    client_state: bool = False
    flattened: bool = False


_PLACES: Mapping[str, _Place] = {
    "lightrft": _Place("", (), "optim_states/", (), "scheduler_state.pt", client_state=True),
    "accelerate": _Place(
        "pytorch_model_fsdp_0/", ("model",), "optimizer_0/", ("optimizer",), "scheduler.pt"
    ),
    "nested": _Place("", ("model",), "", ("optimizer",), "scheduler.pt"),
    "torchtitan": _Place("", (), "", ("optimizer",), "", flattened=True),
}


def as_written(state: TrainingState, layout: str | None) -> TrainingState:
    """The state; flattened, parameters with equal settings are one group."""
    if not _PLACES[layout or LAYOUTS[0]].flattened:
        return state
    return replace(state, groups=joined(state.groups))


def lay_out_state(
    weights: Sequence[TensorToWrite], state: TrainingState, max_file_nbytes: int, layout: str | None
) -> Laid:
    """The model's files, the optimizer's, and those of the run, see `formats.StateWritable`.

    Raises `PlanError` where a step is beyond float32.
    """
    place = _PLACES[layout or LAYOUTS[0]]
    model = Section(
        weights, paths={spec.name: (*place.model_root, spec.name) for spec, _, _ in weights}
    )
    together = place.model_folder == place.state_folder
    optimizer = _section(state, place, rank=1 if together else 0)
    if together:
        files, texts = lay_out_sections(
            [model, optimizer], max_file_nbytes, folder=place.model_folder
        )
    else:
        files, texts = lay_out_sections([model], max_file_nbytes, folder=place.model_folder)
        more, metadata = lay_out_sections([optimizer], max_file_nbytes, folder=place.state_folder)
        files, texts = files + more, texts + metadata
    beside, findings = _run(state, place)
    return Laid(files, (*texts, *beside), findings)


def _section(state: TrainingState, place: _Place, *, rank: int) -> Section:
    root = place.state_root

    def held(name: str, kind: str) -> StatePath:
        path = ("state", name, kind)
        return (*root, ".".join(path)) if place.flattened else (*root, *path)

    def called(name: str) -> tuple[str, ...]:
        return (name, *state.aliases.get(name, ()))

    slots: list[TensorToWrite] = []
    paths: dict[str, StatePath] = {}
    known: dict[StatePath, TensorBytes] = {}
    for name in state.names:
        if name in state.steps:
            step = step_tensor(state.steps[name].count, name)
            known |= {held(each, "step"): step for each in called(name)}
        for kind, table in state.moments.items():
            if name in table:
                key = tensor_name(kind, name)
                spec = table[name].spec
                others = [str(held(each, kind)[-1]) for each in called(name)[1:]]
                source = table[name].aliased(tuple(others))
                slots.append((TensorSpec(key, spec.dtype, spec.shape), source, None))
                paths[key] = held(name, kind)
    objects: dict[StatePath, bytes] = {}
    for at, group in enumerate(state.groups):
        settings = {key: lay_out_data(value) for key, value in group.hyperparameters.items()}
        if place.flattened:
            objects |= {
                (*root, f"param_groups.{each}.{key}"): data
                for name in group.names
                for each in called(name)
                for key, data in settings.items()
            }
        else:
            settings["params"] = lay_out_data(list(group.names))
            objects |= {(*root, "param_groups", at, key): data for key, data in settings.items()}
    if place.flattened:
        if state.scheduler is not None and _misfit(state) is None:
            objects["lr_scheduler", "last_epoch"] = lay_out_data(state.scheduler["last_epoch"])
        known |= {("train_state", key): data for key, data in _counted(state).items()}
    return Section(slots, objects, known, paths, STATE_TABLE, rank)


def _counted(state: TrainingState) -> dict[str, TensorBytes]:
    """torchtitan's counters as far as they are known, as it stores them."""
    counts = {
        "step": (INT32, state.counters.get("step", state.counters.get("global_steps"))),
        "ntokens_seen": (INT64, state.counters.get("ntokens_seen")),
    }
    return {
        key: TensorBytes(dtype, (), count.to_bytes(dtype.itemsize, "little"))
        for key, (dtype, count) in counts.items()
        if count is not None and 0 <= count < 1 << 31
    }


def _run(
    state: TrainingState, place: _Place
) -> tuple[tuple[tuple[str, bytes], ...], tuple[Finding, ...]]:
    """The schedule and the client state, and what of the run is not written."""
    texts: list[tuple[str, bytes]] = []
    findings: list[Finding] = []
    why = _misfit(state)
    if state.scheduler is not None and why is None and not place.flattened:
        texts.append((place.scheduler, lay_out_data(dict(state.scheduler))))
    elif why is not None:
        findings.append(Finding("scheduler-left-out", f"the scheduler's state {why}."))
    if place.client_state:
        texts.append((CLIENT_STATE, lay_out_data(dict(state.client_state))))
        if CONSUMED_SAMPLES not in state.client_state:
            message = (
                f"{CLIENT_STATE} does not say how many samples the run has used up, without which "
                "LightRFT's training does not resume."
            )
            findings.append(Finding("consumed-samples-unknown", message, CLIENT_STATE))
    left = [*_unwritten(state, place)]
    if left:
        message = f"this layout has no place for {listed(left)}; it was not written."
        findings.append(Finding("run-state-left-out", message))
    return tuple(texts), tuple(findings)


def _misfit(state: TrainingState) -> str | None:
    """Why torch's scheduler would not take the state; None: it does, or there is none."""
    scheduler: Mapping[str, Plain] = state.scheduler or {}
    if state.scheduler is not None and "last_epoch" not in scheduler:
        return f"is not that of a scheduler of torch: it holds {listed(scheduler, 4) or 'nothing'}"
    rates = scheduler.get("base_lrs")
    if isinstance(rates, list | tuple) and len(rates) != len(state.groups):
        return f"is of {len(rates)} parameter groups, and the optimizer has {len(state.groups)}"
    return None


def _unwritten(state: TrainingState, place: _Place) -> Iterator[str]:
    if not place.client_state:
        yield from state.client_state
    counted = {"step", "global_steps", "ntokens_seen"} if place.flattened else set()
    yield from (name for name in state.counters if name not in counted)
    if state.scaler:
        yield "the loss scale"
