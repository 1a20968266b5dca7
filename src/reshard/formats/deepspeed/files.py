"""The files of one save, read and checked against each other across ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec import Struct
from msgspec.structs import replace

from reshard.containers.torch import Known, TensorRef
from reshard.containers.torch import read as read_torch
from reshard.core.regex import regex
from reshard.core.tensors import Record, Shape
from reshard.errors import FormatError, IncompleteError, UnsupportedError
from reshard.formats.deepspeed.parse import (
    ExpertFile,
    LayerFile,
    ModelFile,
    OptimFile,
    Shapes,
    parse_expert,
    parse_model,
    parse_optim,
)
from reshard.formats.deepspeed.place import (
    Location,
    absent,
    check_ranks,
    check_written_as,
    describe_extra,
)
from reshard.storage.local import Sources

_ONE_SAVE = "Copy all files of one save."
# Versions that do not state the parameters' shapes in the model file.
_NO_SHAPES = regex(r"0\.[0-5]\.")
# What ds_to_universal is told to call its output, as a rule.
_UNIVERSAL = "_universal"
# Objects that DeepSpeed itself puts in its files; nothing in them is needed.
_OWN = ("deepspeed.runtime.fp16.loss_scaler.", "deepspeed.utils.tensor_fragment.", "torch.Tensor",
        "deepspeed.runtime.bf16_optimizer.", "deepspeed.runtime.zero.config.")  # fmt: skip


class Saved(Struct, frozen=True):
    """The files of one save and one model parallel rank, known to belong together.

    `model` and `optim` are of data parallel ranks 0 to W - 1; below stage 3 there is one model
    file. The `module` of those of ranks 1 and more is left out. `layers` are a pipeline's.
    """

    model: tuple[ModelFile, ...]
    optim: tuple[OptimFile, ...]
    experts: tuple[ExpertFile, ...] = ()
    layers: tuple[LayerFile, ...] = ()

    @property
    def stage(self) -> int:
        return self.optim[0].stage if self.optim else 0

    @property
    def module(self) -> Mapping[str, TensorRef]:
        """The module's state dict in the training dtype, experts included, under global names."""
        module = dict(self.model[0].module)
        for file in self.experts:
            module.update(file.module)
        return module

    @property
    def records(self) -> tuple[Record, ...]:
        """The checksums of all files, a record once."""
        found = [record for file in self.files for record in file.records]
        return tuple(dict.fromkeys(found))

    @property
    def opaque(self) -> list[str]:
        """Names of objects that are not DeepSpeed's own, such as a user's client state."""
        found = {name for file in self.files for name in file.opaque}
        return sorted(name for name in found if not name.startswith(_OWN))

    @property
    def files(self) -> tuple[ModelFile | OptimFile | ExpertFile | LayerFile, ...]:
        """Every file that was read."""
        return (*self.model, *self.optim, *self.experts, *self.layers)


def read(location: Location, sources: Sources) -> Saved:
    """Parse every file of one model parallel rank and check that they belong to one save."""
    saved = parsed(location, sources)
    if saved.model[0].staged and not location.universal:
        raise IncompleteError(
            "it has no module, because the run used pipeline parallelism, but all "
            "layer_*-model_states.pt files are missing.",
            path=saved.model[0].path,
            hint="Copy the files of every rank and layer.",
        )
    return checked(location, saved)


def parsed(location: Location, sources: Sources) -> Saved:
    """What the files of one model parallel rank state, not yet checked against each other."""
    model = _model_files(location, sources)
    if model and model[0].autoep and not location.universal:
        raise _split_by_autoep(location, model[0])
    optim = [
        parse_optim(path, read_torch(sources.open(path)))
        for _, path in sorted(location.optim.items())
    ]
    experts = [
        parse_expert(path, read_torch(sources.open(path)))
        for _, path in sorted(location.experts.items())
    ]
    if not model:
        raise IncompleteError(
            "all model_states files are missing.",
            path=location.folder,
            hint="Copy the files of every rank, mp_rank_*_model_states.pt included.",
        )
    return Saved(tuple(model), tuple(optim), tuple(experts))


def checked(location: Location, saved: Saved) -> Saved:
    """The files of one model parallel rank, proven to be those of all ranks and of one save."""
    optim, model = list(saved.optim), list(saved.model)
    if optim:
        _check_optim(location, optim)
        if model[0].flattened:
            model[0] = replace(model[0], groups=_groups_held(model[0], optim))
        _check_model(model[0], optim[0])
        world_size: int | None = max(optim[0].partition_count)
        check_ranks(location, "optim_states", [dp for dp, _ in location.optim], world_size)
    elif model[0].groups and not location.universal and location.folder.name.endswith(_UNIVERSAL):
        raise IncompleteError(
            "it is named like a universal checkpoint, but its folder zero/, which holds the "
            "weights, is missing.",
            path=location.folder,
            hint="Copy the whole folder, or make the universal checkpoint again.",
        )
    elif model[0].groups and not location.universal:
        raise IncompleteError(
            f"it is a ZeRO-{model[0].stage} checkpoint, but all its optim_states files, which "
            "hold the fp32 weights, are missing.",
            path=location.folder,
            hint="Copy the files of every rank.",
        )
    else:
        world_size = model[0].world_size
    if location.partitioned_model:
        check_ranks(location, "model_states", [dp for dp, _ in location.model], world_size)
    _check_experts(location, model[0], optim)
    saved = replace(saved, model=tuple(model))
    for file in saved.files:
        check_written_as(file.path, file.written_as)
    return saved


def _groups_held(model: ModelFile, optim: Sequence[OptimFile]) -> tuple[Shapes, ...]:
    """The parameters of each group of BF16_Optimizer without ZeRO, of which the model file states
    none: the ranks' files name them in their order, and the module has their shapes."""
    groups = []
    for number in range(len(optim[0].flats)):
        names = [
            n for file in optim for n in (file.held[number] if number < len(file.held) else ())
        ]
        lost = [name for name in names if name not in model.module]
        if lost:
            raise IncompleteError(
                "the optimizer holds it, but the module does not.",
                path=model.path,
                tensor=lost[0],
                hint=_ONE_SAVE,
            )
        groups.append({name: model.module[name].shape for name in names})
    return tuple(groups)


def _split_by_autoep(location: Location, model: ModelFile) -> UnsupportedError:
    """DeepSpeed makes universal checkpoints of runs with ZeRO and without tensor parallelism."""
    possible = location.optim and model.mp_world_size in (None, 1)
    return UnsupportedError(
        "experts split by AutoEP are not supported.",
        path=location.folder,
        hint="Make a universal checkpoint of it with DeepSpeed's ds_to_universal, and convert that."
        if possible
        else None,
    )


def _model_files(location: Location, sources: Sources) -> list[ModelFile]:
    """The model files of all data parallel ranks, which must state the same step and parameters.

    What all of them state is kept once: for 256 ranks it took 300 MB. A file with the pickle of one
    before states what that states.
    """
    model: list[ModelFile] = []
    known = Known()
    stated: dict[int, ModelFile] = {}  # by id of a value that `known` keeps
    for _, path in sorted(location.model.items()):
        content = read_torch(sources.open(path), known=known)
        file = stated.get(id(content.value))
        if file is not None:
            model.append(replace(file, path=path, written_as=content.written_as))
            continue
        file = parse_model(path, content)
        if model:
            _check_agreement(model[0], file)
        first = model[0] if model else file
        own = replace(file, module={}, groups=first.groups, frozen_shapes=first.frozen_shapes)
        model.append(own if model else file)
        if known.keeps(content.value):
            stated[id(content.value)] = own
    return model


def _check_optim(location: Location, optim: list[OptimFile]) -> None:
    """Every rank's file must state the same version, stage, partition count and groups."""
    first = optim[0]
    for other in optim[1:]:
        for what, mine, theirs in (
            ("DeepSpeed version", first.version, other.version),
            ("ZeRO stage", first.stage, other.stage),
            ("partition count", first.partition_count, other.partition_count),
            ("number of flat groups", len(first.flats), len(other.flats)),
            ("alignment padding", first.paddings, other.paddings),
        ):
            if mine != theirs:
                raise FormatError(
                    f"its {what} is {theirs}, that of {first.path.name} is {mine}: files of "
                    "different saves are mixed.",
                    path=other.path,
                    hint=_ONE_SAVE,
                )
    if len(set(first.partition_count)) > 1 and not location.experts:
        raise IncompleteError(
            f"its groups are partitioned over {first.partition_count} ranks, as only those of "
            "experts are, but all layer_*_expert_*_model_states.pt files are missing.",
            path=location.folder,
            hint="Copy the files of every rank and expert.",
        )


def _check_experts(location: Location, model: ModelFile, optim: list[OptimFile]) -> None:
    """Layers 0 to L - 1 must each have as many experts as the model file states."""
    if not location.experts:
        return
    if optim and optim[0].stage == 3:
        raise UnsupportedError("experts under ZeRO-3 are not supported.", path=location.folder)
    for layer, count in enumerate(model.num_experts):
        there = [expert for of, expert in location.experts if of == layer]
        missing = absent(there, count, location.folder)
        extra = sorted(expert for expert in there if expert >= count)
        if missing:
            beyond = f"; {describe_extra(extra, 'expert')}" if extra else ""
            raise IncompleteError(
                f"the files of {len(missing)} of {count} experts of layer {layer} are missing, "
                f"beginning with expert {missing[0]}{beyond}.",
                path=location.folder,
                hint="Copy the files of every rank and expert.",
            )
    expected = sum(model.num_experts)
    if expected != len(location.experts):
        raise FormatError(
            f"it holds files of {len(location.experts)} experts, but {model.path.name} states "
            f"{expected}: files of different saves are mixed.",
            path=location.folder,
            hint=_ONE_SAVE,
        )


def _check_model(first: ModelFile, optim: OptimFile) -> None:
    if not first.groups and first.version and not _NO_SHAPES.match(first.version):
        raise FormatError(
            f"it comes from a save without ZeRO, but {optim.path.name} from one with ZeRO: files "
            "of different saves are mixed.",
            path=first.path,
            hint="Use another save; or, if this file is the newer, move the *_optim_states.pt "
            "files away: it holds all weights.",
        )
    if not first.groups:
        raise UnsupportedError(
            "it does not state the shapes of the parameters: DeepSpeed before 0.6.0 wrote it.",
            path=first.path,
            hint="Load and save it once with a newer DeepSpeed.",
        )
    if first.version is not None and optim.version not in (None, first.version):
        raise FormatError(
            f"its DeepSpeed version is {first.version}, that of {optim.path.name} is "
            f"{optim.version}: files of different saves are mixed.",
            path=first.path,
            hint=_ONE_SAVE,
        )


def _ordered(groups: Sequence[Shapes]) -> tuple[tuple[tuple[str, Shape], ...], ...]:
    return tuple(tuple(group.items()) for group in groups)


def _check_agreement(first: ModelFile, other: ModelFile) -> None:
    """The model files of two ranks must state the same step and parameters."""
    for what, mine, theirs in (
        ("global step", first.steps, other.steps),
        ("DeepSpeed version", first.version, other.version),
        # In their order, which says where each lies in the flat tensors; dicts are equal in any.
        ("list of parameters", _ordered(first.groups), _ordered(other.groups)),
        (
            "list of frozen parameters",
            _ordered([first.frozen_shapes]),
            _ordered([other.frozen_shapes]),
        ),
    ):
        if mine != theirs:
            numbers = f" ({theirs} and {mine})" if not isinstance(mine, tuple | dict) else ""
            raise FormatError(
                f"its {what} is not that of {first.path.name}{numbers}: files of different "
                "saves are mixed.",
                path=other.path,
                hint=_ONE_SAVE,
            )
