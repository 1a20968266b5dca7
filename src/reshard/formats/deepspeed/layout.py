"""Lay out a universal checkpoint, which every ZeRO stage loads at any data parallel world size.

    latest_universal                          the tag
    <tag>/mp_rank_00_model_states.pt          counters, schedule, client state; shapes; in `module`
                                              what is frozen, and buffers: read by stages 1 and 2
    <tag>/zero_pp_rank_0_mp_rank_00_model_states.pt    the same without `module`: read by stage 3
    <tag>/zero/optimizer_state.pt             parameter groups, and the step for stage 3
    <tag>/zero/<parameter>/fp32.pt, exp_avg.pt, ..     {"cat_dim": 0, "param": the whole tensor}
    <tag>/zero/<parameter>/step.pt            a tensor, as torch's Adam wants it

Only stages 1 and 2 load what DeepSpeed's converter writes for a save of these stages, and only
stage 3 loads what it writes for a ZeRO-3 save. This layout has the files of both: stages 1 and 2
read every file of a parameter's folder, stage 3 opens three by name and also accepts tensors in a
dict. Pure, no I/O. Read off DeepSpeed 0.19.8 (runtime/engine.py, runtime/base_optimizer.py,
runtime/zero/stage3.py, checkpoint/universal_checkpoint.py) and proven by loading into each stage.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence

from msgspec import Struct
from msgspec.structs import replace

from reshard.containers.torch.optimizer import step_tensor
from reshard.containers.torch.write import DataArchive, lay_out, lay_out_data
from reshard.core.dtypes import FLOAT32
from reshard.core.plan import OutputFile
from reshard.core.state import STATE_TABLE, Group, Plain, TrainingState, tensor_name
from reshard.core.tensors import Entry, Shape, TensorSpec
from reshard.errors import PlanError
from reshard.formats import Laid, TensorToWrite
from reshard.formats.deepspeed import universal_findings
from reshard.formats.deepspeed.place import LATEST_UNIVERSAL, MODEL, MODEL_STAGE3
from reshard.formats.deepspeed.run_state import COUNTERS

_WEIGHT = "fp32"
# How torch computes a step, not what. `fused` and `capturable` ask for step counts on the GPU, and
# DeepSpeed loads them to the CPU.
_PLAIN: Mapping[str, Plain] = {
    "foreach": None,
    "fused": None,
    "capturable": False,
    "differentiable": False,
}


def as_written(state: TrainingState) -> TrainingState:
    """The state with complete groups, whose switches suit what DeepSpeed loads.

    Raises `PlanError` where the state lacks what a run needs.
    """
    groups = [
        replace(
            group,
            # DeepSpeed's groups hold what is trained; to it, the others are frozen.
            names=tuple(name for name in group.names if name in state.held),
            hyperparameters={**group.hyperparameters, **_plain(group)},
        )
        for group in state.groups
    ]
    return replace(state, groups=tuple(group for group in groups if group.names))


def _plain(group: Group) -> dict[str, Plain]:
    return {key: value for key, value in _PLAIN.items() if key in group.hyperparameters}


def lay_out_state(
    weights: Sequence[TensorToWrite],
    state: TrainingState,
    max_file_nbytes: int,
    layout: str | None,
) -> Laid:
    """The files of a universal checkpoint.

    A parameter's folder holds its master, or its weight where the optimizer updated that itself,
    and its moments, all in float32. Each tensor is a file, of whatever size.

    Raises `PlanError` where the parameters of a group were updated a different number of times.
    """
    made = _Universal({spec.name: (spec, source, ref) for spec, source, ref in weights}, state)
    return made.laid()


class _Universal:
    def __init__(self, weights: Mapping[str, TensorToWrite], state: TrainingState) -> None:
        self._weights = weights
        self._state = state
        self._groups = state.groups
        self._steps = [_step(group, state) for group in self._groups]
        self._trained = {name for group in self._groups for name in group.names}
        self._counters = _counters(state, self._steps)
        self._tag = f"global_step{self._counters['global_steps']}_universal"

    def laid(self) -> Laid:
        files = [*self._parameters()]
        rest = [name for name in self._weights if name not in self._trained]
        top = self._model_file()
        files.append(self._with_module(top, rest))
        texts = (
            (LATEST_UNIVERSAL, self._tag.encode()),
            (f"{self._tag}/{MODEL_STAGE3}", lay_out_data(top)),
            (f"{self._tag}/zero/optimizer_state.pt", lay_out_data(self._optimizer())),
            *self._step_files(),
        )
        shapes = {name: self._weights[name][0].shape for name in self._trained}
        held = [self._weights[name][1].renamed(name) for name in rest]
        found = universal_findings.of(self._state, self._groups, shapes, held)
        return Laid(tuple(files), texts, found)

    def _parameters(self) -> Iterator[OutputFile]:
        """The files of each parameter: its weight in full precision, and its moments."""
        for group in self._groups:
            for name in group.names:
                spec, source, reference = self._weights[name]
                held = self._state.masters.get(name, source)
                yield self._file(name, _WEIGHT, spec.shape, held, "", reference)
                for kind, table in self._state.moments.items():
                    if name in table:
                        yield self._file(name, kind, spec.shape, table[name], STATE_TABLE)

    def _file(
        self,
        name: str,
        kind: str,
        shape: Shape,
        entry: Entry,
        table: str,
        reference: Entry | None = None,
    ) -> OutputFile:
        spec = TensorSpec(tensor_name(kind, name) if table else name, FLOAT32, shape)
        path = f"{self._tag}/zero/{name}/{kind}.pt"
        return _archive(shape).file(path, [(spec, entry, reference)], table)

    def _step_files(self) -> Iterator[tuple[str, bytes]]:
        for group, step in zip(self._groups, self._steps, strict=True):
            if step is None:
                continue
            text = lay_out_data(step_tensor(step.count, group.names[0]))
            for name in group.names:
                yield f"{self._tag}/zero/{name}/step.pt", text

    def _optimizer(self) -> dict[str, object]:
        """`optimizer_state.pt`. Stages 1 and 2 read `param_groups`, stage 3 what is nested.

        Stage 3 gives every group one step: an integer where the source's optimizer counted with
        integers (DeepSpeedCPUAdam, FusedAdam), which each group then counts on for itself.
        """
        groups = [
            {**group.hyperparameters, "params": [number]}
            for number, group in enumerate(self._groups)
        ]
        inner: dict[str, object] = {"param_groups": groups}
        first = next((step for step in self._steps if step is not None), None)
        if first is not None:
            value = first.count if first.integer else step_tensor(first.count, "")
            inner["state"] = {0: {"step": value}}
        return {
            "ds_version": universal_findings.VERSION,
            "param_groups": groups,
            "optimizer_state_dict": inner,
        }

    def _model_file(self) -> dict[str, object]:
        """What both model files hold. Keys that DeepSpeed does not know come back to the script as
        its client state."""
        state = self._state
        names = [name for name in self._weights if name not in self._trained]
        frozen = [name for name in names if self._weights[name][1].kind != "buffer"]
        sources = [(name, source) for name, (_, source, _) in self._weights.items()]
        aliases = {alias: name for name, source in sources for alias in source.aliases}
        return {
            **{key: value for key, value in state.counters.items() if key not in self._counters},
            **state.client_state,
            **self._counters,
            "dp_world_size": 1,
            "mp_world_size": 1,
            "ds_version": universal_findings.VERSION,
            "lr_scheduler": state.scheduler,
            "param_shapes": [
                {name: self._weights[name][0].shape for name in group.names}
                for group in self._groups
            ],
            "frozen_param_shapes": {name: self._weights[name][0].shape for name in frozen},
            "buffer_names": [name for name in names if name not in frozen],
            "shared_params": aliases,
        }

    def _with_module(self, top: Mapping[str, object], rest: Sequence[str]) -> OutputFile:
        """The model file of stages 1 and 2, with what no optimizer updates."""
        specs = {name: self._weights[name][0] for name in rest}
        slots = [self._weights[name] for name in rest]
        return lay_out({"module": specs, **top}).file(f"{self._tag}/{MODEL}", slots)


class _GroupStep(Struct, frozen=True):
    """How often the parameters of a group were updated, and whether by an integer's count."""

    count: int
    integer: bool


def _step(group: Group, state: TrainingState) -> _GroupStep | None:
    """The step of a group; None where its optimizer counts none, as SGD."""
    counts = {state.steps[name].count: name for name in group.names if name in state.steps}
    absent = [name for name in group.names if name not in state.steps]
    if len(counts) > 1 or (counts and absent):
        known = {count: repr(name) for count, name in counts.items()}
        values = [f"{count} of {name}" for count, name in known.items()]
        values += [f"none of {absent[0]!r}"] if absent else []
        raise PlanError(
            f"the parameters of one group were updated a different number of times ({values[0]}, "
            f"{values[1]}), but DeepSpeed loads one step for a whole group.",
            hint="Write it with --to dcp, which has a step for each parameter.",
        )
    if not counts:
        return None
    (count,) = counts
    return _GroupStep(count, state.steps[group.names[0]].stored == "int")


def _counters(state: TrainingState, steps: Sequence[_GroupStep | None]) -> dict[str, int]:
    """The counters that DeepSpeed needs; if the source counts differently, they follow from its
    steps."""
    done = max((step.count for step in steps if step is not None), default=0)
    found = {"global_steps": done, "skipped_steps": 0}
    return found | {key: state.counters[key] for key in COUNTERS if key in state.counters}


@functools.lru_cache(maxsize=256)
def _archive(shape: Shape) -> DataArchive:
    # Layers repeat: a model has a dozen different shapes.
    return lay_out({"cat_dim": 0, "param": TensorSpec("", FLOAT32, shape)})
