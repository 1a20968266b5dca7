"""The files of one save, read and checked against each other across ranks."""

from __future__ import annotations

from dataclasses import dataclass

from reshard.errors import FormatError, IncompleteError, UnsupportedError
from reshard.formats.deepspeed.parse import ModelFile, OptimFile, parse_model, parse_optim
from reshard.formats.deepspeed.place import Location, check_ranks
from reshard.storage import Sources
from reshard.tensors import Record
from reshard.torchfile import read as read_torch


@dataclass(frozen=True, slots=True)
class Saved:
    """All files of one save, of data parallel ranks 0 to W - 1, known to belong together."""

    model: tuple[ModelFile, ...]
    optim: tuple[OptimFile, ...]

    @property
    def stage(self) -> int:
        return self.optim[0].stage if self.optim else 0

    @property
    def records(self) -> tuple[Record, ...]:
        """The checksums of all files, a record once."""
        found = [record for file in self._files for record in file.records]
        return tuple(dict.fromkeys(found))

    @property
    def opaque(self) -> list[str]:
        return sorted({name for file in self._files for name in file.opaque})

    @property
    def _files(self) -> tuple[ModelFile | OptimFile, ...]:
        return (*self.model, *self.optim)


def read(location: Location, sources: Sources) -> Saved:
    """Parse every file of a tag folder and check that they belong to one save."""
    _refuse_model_parallel(location)
    model = [
        parse_model(path, read_torch(sources.open(path)))
        for _, path in sorted(location.model.items())
    ]
    optim = [
        parse_optim(path, read_torch(sources.open(path)))
        for _, path in sorted(location.optim.items())
    ]
    if not model:
        raise IncompleteError(
            "no model_states file is there.",
            path=location.folder,
            hint="Copy the files of every rank, mp_rank_*_model_states.pt included.",
        )
    if not optim:
        if model[0].groups:
            raise IncompleteError(
                f"it is a ZeRO-{model[0].stage} checkpoint and none of its optim_states files, "
                "which hold the fp32 weights, is there.",
                path=location.folder,
                hint="Copy the files of every rank.",
            )
        return Saved(tuple(model), ())
    _check_optim(location, optim)
    world_size = max(optim[0].partition_count)
    ranks = [dp for dp, _ in sorted(location.optim)]
    check_ranks(location, "optim_states", ranks, world_size)
    if location.partitioned_model:
        check_ranks(location, "model_states", [dp for dp, _ in sorted(location.model)], world_size)
    _check_model(model, optim[0])
    return Saved(tuple(model), tuple(optim))


def _refuse_model_parallel(location: Location) -> None:
    ranks = {mp for _, mp in (*location.model, *location.optim)}
    if len(ranks) > 1:
        raise UnsupportedError(
            f"it was trained with model parallelism over {len(ranks)} ranks (tensor or pipeline), "
            "which is not handled.",
            path=location.folder,
        )


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
                    hint="Copy all files of one save.",
                )
    if len(set(first.partition_count)) > 1:
        raise UnsupportedError(
            f"its groups are partitioned over {first.partition_count} ranks, as experts are, "
            "which is not handled.",
            path=location.folder,
        )


def _check_model(model: list[ModelFile], optim: OptimFile) -> None:
    first = model[0]
    if not first.groups:
        raise UnsupportedError(
            "it does not state the parameters' shapes, as DeepSpeed before 0.6.0 did not.",
            path=first.path,
            hint="Load and save it once with a newer DeepSpeed.",
        )
    if first.version is not None and optim.version not in (None, first.version):
        raise FormatError(
            f"its DeepSpeed version is {first.version}, that of {optim.path.name} is "
            f"{optim.version}: files of different saves are mixed.",
            path=first.path,
            hint="Copy all files of one save.",
        )
    for other in model[1:]:
        for what, mine, theirs in (
            ("global step", first.steps, other.steps),
            ("DeepSpeed version", first.version, other.version),
            ("list of parameters", first.groups, other.groups),
            ("list of frozen parameters", first.frozen_shapes, other.frozen_shapes),
        ):
            if mine != theirs:
                numbers = f" ({theirs} and {mine})" if not isinstance(mine, tuple | dict) else ""
                raise FormatError(
                    f"its {what} is not that of {first.path.name}{numbers}: files of different "
                    "saves are mixed.",
                    path=other.path,
                    hint="Copy all files of one save.",
                )
