"""Training state: what an optimizer holds of each parameter, as entries like any other.

    moments   {"exp_avg": {name: Entry}, "exp_avg_sq": {name: Entry}}     in the parameter's shape
    masters   {name: Entry}         full-precision weights that the optimizer updates
    steps     {name: Step}          how often each parameter was updated
    groups    (Group, ...)          which parameters share which hyperparameters

Names are those of the catalog that the state belongs to: a parameter's own name, never that of a
tied alias. Frozen parameters and buffers have no state. If only some parameters have a kind of
moment (Muon beside AdamW), its table has only these. Whatever else a run needs to continue
(schedule, counters, what the user's own code saved) is plain data; everything else is listed and
left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Literal, TypeAlias, TypeVar

from msgspec import Struct, field
from msgspec.structs import replace

from reshard.core.findings import Finding
from reshard.core.tensors import Entry, Record
from reshard.errors import FormatError, listed

#: Data without tensors and objects: None, bool, int, float, str, and lists, tuples and dicts of it.
Plain: TypeAlias = object
#: How a step count stands in a file: as a tensor of that type, or as Python's integer.
Stored = Literal["float32", "int32", "int64", "int"]


class Step(Struct, frozen=True):
    """How many updates a parameter has had, and how the checkpoint stores the number."""

    count: int
    stored: Stored = "float32"


class Group(Struct, frozen=True):
    """A parameter group: the names that it covers, in the optimizer's order.

    `hyperparameters` are as the checkpoint states them (`lr` is that of the last step,
    `initial_lr` there where a scheduler had set it), but for the parameters themselves and a step.
    Empty: the checkpoint does not hold them.
    """

    names: tuple[str, ...]
    hyperparameters: Mapping[str, Plain] = field(default_factory=dict)


class TrainingState(Struct, frozen=True, dict=True):
    """The state of one model's optimizer, and what of its run is plain data.

    `masters` is empty where the optimizer updates the model's weights themselves. `scheduler` is
    the scheduler's state dict. `counters` are what the checkpoint counts, by the framework's names
    (`global_steps`, `skipped_steps`, `consumed_samples`). `scaler` is the state of the loss scaler
    of fp16 training. `left_out` says what the checkpoint holds beside these that does not travel.
    `records` are the checksums of the files' stretches that the entries lie in. `source` says in
    words where it was read (`"ZeRO-2"`). `aliases` are more names by which a parameter's state is
    to be written: those of other versions of a trainer.
    """

    moments: Mapping[str, Mapping[str, Entry]]
    masters: Mapping[str, Entry] = field(default_factory=dict)
    steps: Mapping[str, Step] = field(default_factory=dict)
    groups: tuple[Group, ...] = ()
    scheduler: Mapping[str, Plain] | None = None
    counters: Mapping[str, int] = field(default_factory=dict)
    client_state: Mapping[str, Plain] = field(default_factory=dict)
    scaler: Mapping[str, Plain] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    records: tuple[Record, ...] = ()
    findings: tuple[Finding, ...] = ()
    source: str = ""
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters that a group covers or that have any state, each once."""
        covered = (name for group in self.groups for name in group.names)
        held = (name for table in self.moments.values() for name in table)
        return tuple(dict.fromkeys((*covered, *held, *self.masters)))

    @cached_property
    def held(self) -> frozenset[str]:
        """The parameters that have moments. A group may cover others: frozen ones that the script
        passed to its optimizer, and those never updated."""
        return frozenset(name for table in self.moments.values() for name in table)

    @property
    def step_range(self) -> tuple[int, ...]:
        """The fewest and the most steps of a parameter: one number if they are equal, none if the
        state counts no steps."""
        counts = {step.count for step in self.steps.values()}
        return tuple(dict.fromkeys((min(counts), max(counts)))) if counts else ()

    @property
    def hyperparameters_known(self) -> bool:
        """Whether every group states its hyperparameters."""
        return bool(self.groups) and all(group.hyperparameters for group in self.groups)

    def tables(self) -> Iterator[tuple[str, Mapping[str, Entry]]]:
        """Every table of tensors by its kind, `MASTER` among them where there are masters."""
        if self.masters:
            yield MASTER, self.masters
        yield from self.moments.items()

    def entries(self, *, masters: bool = True) -> Iterator[Entry]:
        """Every tensor of the state, by the name that it goes by among all, see `tensor_name`."""
        for kind, table in self.tables() if masters else self.moments.items():
            for name, entry in table.items():
                yield entry.renamed(tensor_name(kind, name))

    @property
    def nbytes(self) -> int:
        """Bytes of all moments, as the checkpoint holds them; masters are not counted."""
        tables = self.moments.values()
        return sum(entry.spec.nbytes for table in tables for entry in table.values())

    def renamed(self, rename: Callable[[str], str]) -> TrainingState:
        """The same state with other names for the parameters, which must stay different."""

        def table(of: Mapping[str, Entry]) -> dict[str, Entry]:
            return {rename(name): entry.renamed(rename(name)) for name, entry in of.items()}

        return replace(
            self,
            moments={kind: table(of) for kind, of in self.moments.items()},
            masters=table(self.masters),
            steps={rename(name): step for name, step in self.steps.items()},
            groups=tuple(
                replace(group, names=tuple(map(rename, group.names))) for group in self.groups
            ),
        )

    def owned(self, entries: Mapping[str, Entry], prefix: str = "") -> TrainingState:
        """The state under the names of the entries: not under an alias, nor with a prefix by which
        a flat state dict names the model."""
        owners = {alias: name for name, entry in entries.items() for alias in entry.aliases}

        def own(name: str) -> str:
            for known in (name, name.removeprefix(prefix)):
                if known in entries or known in owners:
                    return owners.get(known, known)
            return name

        wanted = self.names
        if all(name in entries for name in wanted):
            return self
        inside = {name for name in wanted if name in entries or own(name) != name}
        if len({own(name) for name in inside}) < len(inside):
            return self  # two names of one tensor; `checked` says so
        return self.renamed(own)

    def only(self, names: Mapping[str, str]) -> TrainingState:
        """The state of some parameters, under new names; what it holds of others is left out, and a
        group without parameters is dropped."""
        others = [name for name in self.names if name not in names]
        groups = [
            replace(group, names=tuple(name for name in group.names if name in names))
            for group in self.groups
        ]
        held = replace(
            self,
            moments={k: _of(table, names) for k, table in self.moments.items()},
            masters=_of(self.masters, names),
            steps=_of(self.steps, names),
            groups=tuple(group for group in groups if group.names),
        )
        if others:
            left = f"the state of {len(others)} parameters outside ({listed(others, 2)})"
            held = replace(held, left_out=(*held.left_out, left))
        return held.renamed(lambda name: names[name])

    def checked(self, entries: Mapping[str, Entry], root: object) -> TrainingState:
        """The same state, proven to be of the model that `entries` are of.

        Every name is that of an entry, every tensor has its parameter's shape, and the groups
        cover each parameter with moments exactly once. `root` is named in errors.

        Raises `FormatError`.
        """
        foreign = [name for name in self.names if name not in entries]
        if foreign:
            raise FormatError(
                f"the optimizer's state is of {len(foreign)} parameters that the model does not "
                f"have: {listed(foreign, 4)}. It is that of another model.",
                path=str(root),
                hint=WEIGHTS_ALONE,
            )
        for kind, table in self.tables():
            for name, entry in table.items():
                if entry.spec.shape != entries[name].spec.shape:
                    raise FormatError(
                        f"its {kind} has shape {entry.spec.shape}, and the parameter "
                        f"{entries[name].spec.shape}: the optimizer's state is that of another "
                        "model, or of an optimizer that factors its moments.",
                        path=str(root),
                        tensor=name,
                        hint=WEIGHTS_ALONE,
                    )
        covered = [name for group in self.groups for name in group.names]
        twice = [name for name, count in Counter(covered).items() if count > 1]
        lost = sorted(self.held.difference(covered))
        if twice or lost:
            what = f"{listed(lost, 4)} is in none" if lost else f"{listed(twice, 4)} is in several"
            raise FormatError(
                f"the parameter groups do not cover the parameters: {what}.",
                path=str(root),
                hint=WEIGHTS_ALONE,
            )
        return self


_Held = TypeVar("_Held")


def _of(table: Mapping[str, _Held], names: Mapping[str, str]) -> dict[str, _Held]:
    return {name: held for name, held in table.items() if name in names}


#: The way out where a training state cannot be carried.
WEIGHTS_ALONE = "Convert the weights alone, without --optimizer."
#: What the table of masters is called among the kinds of moments.
MASTER = "master"
#: The table of an output's files that hold training state (`OutputFile.table`).
STATE_TABLE = "optimizer"
# Means and maxima of squares, and of magnitudes.
_SQUARES = frozenset({"exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg"})


def tensor_name(kind: str, name: str) -> str:
    """What a tensor of the state is called among all tensors of a checkpoint.

    >>> tensor_name("exp_avg", "model.norm.weight")
    'exp_avg.model.norm.weight'
    """
    return f"{kind}.{name}"


def is_square(tensor: str) -> bool:
    """Whether a tensor's name is that of a moment that is never below zero, see `tensor_name`.

    >>> is_square("exp_avg_sq.model.norm.weight")
    True
    """
    return tensor.partition(".")[0] in _SQUARES


class ReadState:
    """Reads a checkpoint's training state when it is called, from its metadata and a few bytes for
    each step count.

    Says nothing of what it will read: of two catalogs that are equal, the readers are too.
    """

    def __init__(self, read: Callable[[], TrainingState]) -> None:
        self._read = read

    def __call__(self) -> TrainingState:
        return self._read()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ReadState)

    def __hash__(self) -> int:
        return hash(ReadState)
