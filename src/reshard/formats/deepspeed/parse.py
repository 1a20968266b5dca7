"""What DeepSpeed's files say, as types."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct

from reshard.containers.torch import Opaque, TensorRef, TorchFile
from reshard.core.tensors import Record, is_shape
from reshard.errors import FormatError, UnsupportedError, brief

Shapes = dict[str, tuple[int, ...]]
# The masters of ZeRO-1 and 2 and of BF16_Optimizer.
_BF16 = "single_partition_of_fp32_groups"


class ModelFile(Struct, frozen=True):
    """A `*_model_states.pt` file. Values of `module` that are not tensors are left out.

    `unread` are tensors of `module` of kinds that are not supported, each with what it is.

    `parallel_info` is `universal_checkpoint_info`, as it stands: how tensor parallel ranks split
    the parameters. `num_experts` has a number for each layer of experts, `autoep` for each module
    whose experts AutoEP has split. `holds_optimizer`: without ZeRO its state is in this file;
    `masters` are then the fp32 weights that a 16-bit run keeps without names, group by group;
    `flat_masters` those of a group end to end, as a fused optimizer has them. `staged`: the module
    lies in the files of a pipeline's layers. `flattened`: the run's optimizer was BF16_Optimizer
    without ZeRO, whose flat masters are in the optimizer files.
    """

    path: Path
    module: Mapping[str, TensorRef]
    unread: Mapping[str, str]
    buffers: frozenset[str]
    groups: tuple[Shapes, ...]
    frozen_shapes: Shapes
    frozen_fragments: Mapping[str, TensorRef]
    shared: Mapping[str, str] | None
    version: str | None
    steps: int | None
    skipped: int
    stage: int
    world_size: int | None
    mp_world_size: int | None
    pipeline_stages: int
    parallel_info: Mapping[str, Any] | None
    num_experts: tuple[int, ...]
    autoep: Mapping[str, int]
    data_before_experts: bool
    holds_optimizer: bool
    masters: tuple[tuple[TensorRef, ...], ...]
    flat_masters: tuple[TensorRef, ...]
    staged: bool
    flattened: bool
    records: tuple[Record, ...]
    opaque: tuple[str, ...]
    written_as: str | None


class OptimFile(Struct, frozen=True):
    """A `*_optim_states.pt` file of one data parallel rank.

    `flats` are this rank's flat fp32 tensors: one for each parameter group (stages 1 and 2) or
    sub-group (stage 3). `paddings[g][k]` elements of filler follow parameter `k` of group `g`.
    `held[g]` are the parameters of group `g` of which this rank has a part, in their order.
    """

    path: Path
    stage: int
    flats: tuple[TensorRef, ...]
    partition_count: tuple[int, ...]
    paddings: tuple[tuple[int, ...], ...] | None
    held: tuple[tuple[str, ...], ...]
    version: str | None
    step: TensorRef | int | None
    moments: tuple[TensorRef, ...]
    records: tuple[Record, ...]
    opaque: tuple[str, ...]
    written_as: str | None


class ExpertFile(Struct, frozen=True):
    """A `layer_*_expert_*_model_states.pt` file: an expert's weights in the training dtype."""

    path: Path
    module: Mapping[str, TensorRef]
    records: tuple[Record, ...]
    opaque: tuple[str, ...]
    written_as: str | None


class LayerFile(Struct, frozen=True):
    """A `layer_*-model_states.pt` file: the state dict of the pipeline's layer `number`.

    Values that are not tensors are left out; `unread` are tensors of kinds that are not supported.
    """

    path: Path
    number: int
    module: Mapping[str, TensorRef]
    unread: Mapping[str, str]
    records: tuple[Record, ...]
    opaque: tuple[str, ...]
    written_as: str | None


def parse_model(path: Path, file: TorchFile) -> ModelFile:
    """A model file's content as types. Raises `FormatError` for what DeepSpeed never writes."""
    top = _mapping(file.value, path, "the file")
    module = top.get("module", {})
    staged = module is None
    module = {} if staged else module
    optimizer = _settings(top.get("optimizer"))
    groups = top.get("param_shapes")
    groups = [groups] if isinstance(groups, dict) else _list(top, "param_shapes", path)
    config = _settings(top.get("ds_config"))
    stage = _settings(config.get("zero_optimization")).get("stage")
    degrees = _settings(top.get("checkpoint_parallel_dimensions"))
    info = top.get("universal_checkpoint_info")
    experts = top.get("num_experts")
    shared = top.get("shared_params")
    return ModelFile(
        path=path,
        module=_tensors(_mapping(module, path, "module")),
        unread=_unread(module),
        buffers=frozenset(n for n in _list(top, "buffer_names", path) if isinstance(n, str)),
        groups=tuple(_shapes(group, path) for group in groups),
        frozen_shapes=_shapes(top.get("frozen_param_shapes") or {}, path),
        frozen_fragments=_tensors(
            _mapping(top.get("frozen_param_fragments") or {}, path, "frozen_param_fragments")
        ),
        shared=None if shared is None else _strings(shared, path),
        version=_text(top.get("ds_version")),
        steps=_integer(top.get("global_steps")),
        skipped=_integer(top.get("skipped_steps")) or 0,
        stage=stage if isinstance(stage, int) else 0,
        world_size=_integer(top.get("dp_world_size")),
        mp_world_size=_integer(top.get("mp_world_size")),
        pipeline_stages=_integer(degrees.get("pp_degree")) or 1,
        parallel_info=info if isinstance(info, dict) else None,
        num_experts=tuple(n for n in experts if type(n) is int)
        if isinstance(experts, list)
        else (),
        autoep=_autoep(top, path),
        holds_optimizer=isinstance(top.get("optimizer"), dict),
        masters=_masters(optimizer.get("fp32_groups"), path),
        flat_masters=_flat_masters(optimizer.get("fp32_groups_flat"), path),
        staged=staged,
        flattened=not groups and _BF16 in optimizer,
        data_before_experts=config.get("use_data_before_expert_parallelism") is True,
        records=file.records,
        opaque=file.opaque,
        written_as=file.written_as,
    )


def _flat_masters(groups: object, path: Path) -> tuple[TensorRef, ...]:
    """`fp32_groups_flat` of FP16_Optimizer: a flat tensor for each group."""
    held = groups if isinstance(groups, list) else [] if groups is None else [None]
    found = [t for t in held if isinstance(t, TensorRef) and t.dtype.floating]
    if len(found) != len(held) or any(len(t.shape) != 1 or t.strides for t in found):
        raise FormatError("its fp32_groups_flat are not flat tensors.", path=path)
    return tuple(found)


def _masters(groups: object, path: Path) -> tuple[tuple[TensorRef, ...], ...]:
    """`fp32_groups` of FP16_UnfusedOptimizer: a list of shaped tensors for each group."""
    if groups is None:
        return ()
    found: list[tuple[TensorRef, ...]] = []
    for group in groups if isinstance(groups, list) else [None]:
        tensors = group if isinstance(group, list) else [None]
        held = tuple(t for t in tensors if isinstance(t, TensorRef) and t.dtype.floating)
        if len(held) != len(tensors):
            raise FormatError("its fp32_groups are not lists of tensors.", path=path)
        found.append(held)
    return tuple(found)


def _autoep(top: Mapping[str, Any], path: Path) -> dict[str, int]:
    """The modules whose experts AutoEP has split, each with their number (`ds_autoep_layers`).

    The key once was `autoep_layers` (checkpoint/constants.py: AUTOEP_LAYERS_KEY_LEGACY).
    """
    counts: dict[str, int] = {}
    layers = _list(top, "ds_autoep_layers", path) or _list(top, "autoep_layers", path)
    for layer in layers:
        stated = _mapping(layer, path, "a layer of ds_autoep_layers")
        module, count = stated.get("module_path"), stated.get("num_experts")
        prefix = f"{module}.experts" if module else "experts"
        if (
            not isinstance(module, str)
            or type(count) is not int
            or count < 1
            or stated.get("expert_key_prefix") != prefix
            or module in counts
        ):
            raise FormatError(f"its ds_autoep_layers state {brief(layer)}.", path=path)
        counts[module] = count
    return counts


def refuse_unread(model: ModelFile, names: Collection[str]) -> None:
    """Raise `UnsupportedError` for the first of these tensors that is of a kind not handled."""
    for name, what in model.unread.items():
        if name in names:
            raise UnsupportedError(
                f"it is {what}, which is not supported.", path=model.path, tensor=name
            )


def parse_expert(path: Path, file: TorchFile) -> ExpertFile:
    """An expert file's content as types: a state dict and nothing else."""
    top = _mapping(file.value, path, "the file")
    module = _tensors(top)
    if len(module) != len(top):
        raise UnsupportedError(
            "it holds more than an expert's weights, as under AutoEP with tensor parallelism, "
            "which is not supported.",
            path=path,
        )
    return ExpertFile(path, module, file.records, file.opaque, file.written_as)


def parse_layer(path: Path, number: int, file: TorchFile) -> LayerFile:
    """The content of a file of the pipeline's layer `number` as types."""
    top = _mapping(file.value, path, "the file")
    return LayerFile(
        path, number, _tensors(top), _unread(top), file.records, file.opaque, file.written_as
    )


def parse_optim(path: Path, file: TorchFile) -> OptimFile:
    """An optimizer file's content as types. Raises `FormatError`, `UnsupportedError`."""
    top = _mapping(file.value, path, "the file")
    state = _mapping(top.get("optimizer_state_dict"), path, "optimizer_state_dict")
    if "ds_zero_partition_groups" in state:
        raise UnsupportedError("experts split by AutoEP are not supported.", path=path)
    if "fp32_flat_groups" in state:
        key, stage = "fp32_flat_groups", 3
    elif _BF16 in state:
        # BF16_Optimizer states no stage and is laid out as stage 1.
        key, stage = _BF16, _integer(state.get("zero_stage")) or 1
    else:
        raise FormatError("it holds no fp32 weights.", path=path)
    flats = state[key]
    if not isinstance(flats, list) or not all(isinstance(flat, TensorRef) for flat in flats):
        raise FormatError(f"its {key} is not a list of tensors.", path=path)
    for flat in flats:
        if len(flat.shape) != 1 or flat.strides is not None or not flat.dtype.floating:
            raise FormatError(
                f"a flat group has dtype {flat.dtype} and shape {flat.shape}.", path=path
            )
    count = state.get("partition_count")
    stated = count if isinstance(count, list) else [count]
    counts = [n for n in stated if type(n) is int and n > 0]
    if not counts or len(counts) != len(stated):
        raise FormatError(f"its partition_count is {brief(count)}.", path=path)
    step, moments = _base_state(state)
    return OptimFile(
        path=path,
        stage=stage,
        flats=tuple(flats),
        partition_count=tuple(counts),
        paddings=_paddings(state.get("param_alignment_paddings"), path),
        held=_held(state.get("param_slice_mappings")),
        version=_text(top.get("ds_version") or state.get("ds_version")),
        step=step,
        moments=moments,
        records=file.records,
        opaque=file.opaque,
        written_as=file.written_as,
    )


def _base_state(state: Mapping[str, Any]) -> tuple[TensorRef | int | None, tuple[TensorRef, ...]]:
    """The step count and the moments of the wrapped optimizer, wherever this version keeps them."""
    base = state.get("base_optimizer_state", state.get("optimizer_state_dict"))
    groups: list[object] = []
    if isinstance(base, dict):
        inner = base.get("state", {})
        groups = list(inner.values()) if isinstance(inner, dict) else []
    elif isinstance(base, list):  # elastic checkpoints: one dict a group
        groups = list(base)
    found = [group for group in groups if isinstance(group, dict)]
    step = state.get("base_optimizer_state_step")
    for group in found:
        step = group.get("step") if step is None else step
    if not (type(step) is int or (isinstance(step, TensorRef) and step.shape in ((), (1,)))):
        step = None
    moments = [
        value
        for group in found
        for value in group.values()
        if isinstance(value, TensorRef) and value.shape not in ((), (1,))
    ]
    return step, tuple(moments)


def _held(mappings: object) -> tuple[tuple[str, ...], ...]:
    """The names in `param_slice_mappings`, a dict for each group; none where it is another."""
    groups = mappings if isinstance(mappings, list) else []
    if not all(
        isinstance(group, dict) and all(isinstance(n, str) for n in group) for group in groups
    ):
        return ()
    return tuple(tuple(group) for group in groups)


def _unread(values: Mapping[Any, object]) -> dict[str, str]:
    """The tensors of kinds that are not supported, each with what it is."""
    return {
        name: value.describe()
        for name, value in values.items()
        if isinstance(name, str) and isinstance(value, Opaque) and value.is_tensor
    }


def _mapping(value: object, path: Path, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise FormatError(
            f"{what} is a {type(value).__name__}, not a dict; it is not a checkpoint of DeepSpeed.",
            path=path,
        )
    return value


def _list(top: Mapping[str, Any], key: str, path: Path) -> list[Any]:
    """A section that is a list; empty where there is none."""
    value = top.get(key) or []
    if not isinstance(value, list | tuple):
        raise FormatError(f"its {key} is a {type(value).__name__}, not a list.", path=path)
    return list(value)


def _settings(value: object) -> dict[Any, Any]:
    """A section of a configuration; empty where there is none."""
    return value if isinstance(value, dict) else {}


def _tensors(values: Mapping[Any, object]) -> dict[str, TensorRef]:
    return {
        name: value
        for name, value in values.items()
        if isinstance(name, str) and isinstance(value, TensorRef)
    }


def _shapes(value: object, path: Path) -> Shapes:
    shapes = _mapping(value, path, "a list of shapes")
    for name, shape in shapes.items():
        sound = isinstance(shape, tuple | list) and is_shape(shape)
        if not isinstance(name, str) or not sound:
            raise FormatError(f"the shape of {brief(name)} is {brief(shape)}.", path=path)
    return {name: tuple(shape) for name, shape in shapes.items()}


def _strings(value: object, path: Path) -> dict[str, str]:
    mapping = _mapping(value, path, "shared_params")
    if not all(isinstance(item, str) for pair in mapping.items() for item in pair):
        raise FormatError("its shared_params do not name parameters.", path=path)
    return mapping


def _paddings(value: object, path: Path) -> tuple[tuple[int, ...], ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(group, list | tuple) for group in value):
        raise FormatError("its param_alignment_paddings are not lists.", path=path)
    paddings = tuple(tuple(group) for group in value)
    if not all(type(n) is int and n >= 0 for group in paddings for n in group):
        raise FormatError("its param_alignment_paddings are not numbers.", path=path)
    return paddings


def _integer(value: object) -> int | None:
    return value if type(value) is int else None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
