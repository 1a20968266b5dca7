"""The optimizers of rank files: one file a rank.

    model_world_size_2_rank_0.pt         verl: {name: DTensor}
    optim_world_size_2_rank_0.pt         {"state": {0: {"exp_avg": DTensor, ..}, ..},
                                          "param_groups": [{"params": [0, 1], ..}]}
    extra_state_world_size_2_rank_0.pt   {"lr_scheduler": .., "rng": ..}

    pytorch_model_fsdp_0_rank0.bin       accelerate with use_dcp=False: {name: DTensor}
    optimizer_0_rank0.bin                {"state": {name: {"exp_avg": DTensor, ..}, ..}, ..}

    model_rank0.pt  optim_rank0.pt       any script's

`optimizer.state_dict()`, as verl saves it, numbers the parameters. The shapes and the order of the
model's parameters show which parameter a number stands for, or nothing does
(`reshard.naming.order`). FSDP1 keeps its moments flattened: see `flattened`.
`FSDP.optim_state_dict` and `get_optimizer_state_dict`, as accelerate saves them, have names and
whole shapes. verl 0.9.1, accelerate 1.15 (utils/fsdp_utils.py), torch 2.13.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path

from msgspec.structs import replace

from reshard.containers.distributed import Decoder, Local, is_distributed
from reshard.containers.torch import Opaque, TensorRef
from reshard.containers.torch import read as read_torch
from reshard.containers.torch.optimizer import Key, OptimizerDict, parse
from reshard.containers.torch.plain import PlainData
from reshard.core.findings import state_named_by_order
from reshard.core.state import WEIGHTS_ALONE, Group, Plain, ReadState, TrainingState, tensor_name
from reshard.core.tensors import Entry
from reshard.errors import FormatError, IncompleteError, UnsupportedError
from reshard.formats import optimizer_file, run_files
from reshard.formats.optimizer_file import names_of
from reshard.formats.rank_files import files, flattened, join
from reshard.formats.rank_files.files import Saved
from reshard.formats.rank_files.state import State
from reshard.formats.run_files import read_run_file
from reshard.storage.local import Sources, child
from reshard.storage.paths import is_file, is_folder

_OPTIMIZER, _EXTRA = "optim_world_size_", "extra_state_world_size_"
_ONE_SAVE = "Copy the files of all ranks again, from one save."


def reader(
    saved: Saved, model: Sequence[State], entries: Mapping[str, Entry], sources: Sources
) -> ReadState | None:
    """What reads the state beside the ranks' model files, whose content is `model` and whose
    tensors are `entries`; None where there is none."""
    series = files.optimizers(saved)
    folder = saved.folder / files.optimizer_folder(saved)
    if not series and not is_folder(folder):
        return None

    def read() -> TrainingState:
        if not series:
            raise UnsupportedError(
                f"the optimizer's state lies in {folder.name}/, another kind of save than the "
                "model's: it is not read beside files of ranks.",
                path=folder,
                hint=WEIGHTS_ALONE,
            )
        if len(series) > 1:
            raise optimizer_file.several(saved.folder, series)
        (there,) = series.values()
        lost = sorted(saved.files.keys() - there.keys())
        if lost:
            raise IncompleteError(
                f"the optimizer's file of rank {lost[0]} is missing, although other ranks have "
                "theirs.",
                path=saved.folder,
                hint=_ONE_SAVE,
            )
        mine = {rank: there[rank] for rank in saved.files}
        plain = PlainData(sources)
        return _Reading(replace(saved, files=mine), model, entries, plain).state()

    return ReadState(read)


class _Reading:
    """The ranks' optimizers, and how they become one state."""

    def __init__(
        self,
        saved: Saved,
        model: Sequence[State],
        entries: Mapping[str, Entry],
        plain: PlainData,
    ) -> None:
        self._saved, self._model, self._entries, self._plain = saved, model, entries, plain
        self._found: list[OptimizerDict] = []
        self._files: list[State] = []
        for rank, path in sorted(saved.files.items()):
            content = read_torch(plain.sources.open(child(saved.folder, path.name)))
            self._found.append(parse(content.value, plain, path))
            records = tuple(sorted(content.records, key=lambda record: record.extent.offset))
            self._files.append(State(path, rank, {}, records))

    def state(self) -> TrainingState:
        """All moments under their names."""
        first = self._found[0]
        _check_same(self._found, self._files)
        flat = self._flattened()
        if flat is not None:
            return self._made(flat.moments, flat.names, flat.table, by_order=True)
        table = self._joined()

        def shape(key: Key) -> Hashable:
            kinds = first.states[key].moments if key in first.states else {}
            found = [table.entries[tensor_name(kind, str(key))].spec.shape for kind in kinds]
            return found[0] if found else None

        names, by_order = names_of(first, shape, self._parameters, self._files[0].path)
        moments: dict[str, dict[str, Entry]] = {}
        for key, state in first.states.items():
            for kind in state.moments if key in names else ():
                entry = table.entries[tensor_name(kind, str(key))]
                moments.setdefault(kind, {})[names[key]] = entry.renamed(names[key])
        return self._made(moments, {k: (n,) for k, n in names.items()}, table, by_order=by_order)

    def _flattened(self) -> flattened.Flattened | None:
        """FSDP1's flat tensors, if the state is of these.

        Raises `UnsupportedError` where lengths do not tell whose they are.
        """
        tensors = [
            tensor
            for one in self._found
            for key, state in one.states.items()
            for tensor in state.moments.values()
            if isinstance(key, int)
        ]
        flat = all(isinstance(t, TensorRef) and len(t.shape) == 1 for t in tensors)
        if not tensors or not flat:
            return None
        found = flattened.read(
            self._found, self._files, self._model, self._saved, self._plain.sources
        )
        if found is None:
            raise UnsupportedError(
                "the optimizer's state is flattened, as FSDP1 keeps it, and the lengths of its "
                "tensors match the model's parameters in no way or in several ways, so reshard "
                "cannot tell which parameters the state belongs to.",
                path=self._files[0].path,
                hint="Save it with FSDP.optim_state_dict, or convert the weights alone, without "
                "--optimizer.",
            )
        return found

    def _joined(self) -> join.Table:
        """The moments of all ranks, by kind and key."""
        states = []
        for one, file in zip(self._found, self._files, strict=True):
            decoder = Decoder(str(file.path), file.rank, self._plain.sources)
            states.append(
                replace(file, tensors=_tensors(one, decoder, file.path, len(self._files)))
            )
        return join.joined(states, self._saved, self._plain.sources)

    def _parameters(self) -> list[tuple[str, Hashable]]:
        """The model's parameters, by their names and shapes, in its order."""
        return [(n, e.spec.shape) for n, e in self._entries.items() if e.kind != "buffer"]

    def _made(
        self,
        moments: Mapping[str, Mapping[str, Entry]],
        names: Mapping[Key, tuple[str, ...]],
        table: join.Table,
        *,
        by_order: bool,
    ) -> TrainingState:
        first, folder = self._found[0], self._saved.folder
        steps = {
            name: state.step
            for one in self._found
            for key, state in one.states.items()
            for name in names.get(key, ())
            if state.step is not None
        }
        if self._saved.writer == "verl":
            scheduler, counters = _scheduler(self._saved, self._plain), {}
        else:
            scheduler = run_files.scheduler(folder, self._plain)
            counters = run_files.trainer_counters(folder)
            run_files.leave_files(folder, self._plain)
        named = sum(map(len, names.values()))
        return TrainingState(
            moments=moments,
            steps=steps,
            groups=tuple(
                Group(tuple(n for key in group.params for n in names[key]), group.hyperparameters)
                for group in first.groups
            ),
            scheduler=scheduler,
            counters=counters,
            left_out=tuple(self._plain.left_out),
            records=table.records,
            findings=(*((state_named_by_order(named),) if by_order else ()), *table.findings),
            source="files of each rank",
        ).owned(self._entries)


def _tensors(
    one: OptimizerDict, decoder: Decoder, path: Path, world: int
) -> dict[str, TensorRef | Local]:
    """A rank's moments by kind and key. Every rank holds all plain tensors that have names."""
    tensors: dict[str, TensorRef | Local] = {}
    for key, state in one.states.items():
        for kind, value in state.moments.items():
            name = tensor_name(kind, str(key))
            if isinstance(value, Opaque) and is_distributed(value):
                tensors[name] = decoder.decode(name, value)
            elif isinstance(value, TensorRef) and (world == 1 or isinstance(key, str)):
                tensors[name] = value
            else:
                what = "a plain tensor" if isinstance(value, TensorRef) else value.describe()
                raise UnsupportedError(
                    f"the {kind} of parameter {key} is {what}, and no file says how the ranks "
                    "share it.",
                    path=path,
                    hint=WEIGHTS_ALONE,
                )
    return tensors


def _check_same(optimizers: Sequence[OptimizerDict], states: Sequence[State]) -> None:
    """All ranks must have the same groups, and no two another step of one parameter."""
    counts: dict[Key, int | None] = {}
    for one, state in zip(optimizers, states, strict=True):
        held = {key: None if s.step is None else s.step.count for key, s in one.states.items()}
        apart = any(counts.setdefault(key, count) != count for key, count in held.items())
        if apart or one.groups != optimizers[0].groups:
            raise FormatError(
                f"its optimizer's groups or steps are not those of {states[0].path.name}: files "
                "of different saves are mixed.",
                path=state.path,
                hint=_ONE_SAVE,
            )


def _scheduler(saved: Saved, plain: PlainData) -> dict[str, Plain] | None:
    """The schedule of the first rank's extra state; what else is in it does not travel."""
    name = saved.files[min(saved.files)].name.replace(_OPTIMIZER, _EXTRA, 1)
    if not is_file(saved.folder / name):
        return None
    value = read_run_file(child(saved.folder, name), plain.sources)
    held = value if isinstance(value, dict) else {}
    for key in held:
        if key != "lr_scheduler":
            plain.leave(f"{key} ({name})")
    return plain.state_dict(held.get("lr_scheduler"), "lr_scheduler") or None
