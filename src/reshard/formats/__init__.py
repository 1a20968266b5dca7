"""The formats, by name. A format is one room: detect, read and, if it is writable, lay out.

Adding one is a module with the functions of `Format`, and its `FormatInfo` (`info`).

huggingface        safetensors, whole or in shards; the index: weight_map
deepspeed/         no ZeRO, ZeRO-1 to 3, pipelines, AutoTP, AutoEP, universal checkpoints
dcp/               PyTorch distributed checkpoints
megatron/          Megatron-Core's torch_dist
rank_files/        one torch.save file a rank
torch_state_dict   a state dict in a torch.save file; its optimizer: optimizer_file
meta               Meta's own Llama
locate             the checkpoint in a folder that a user named; tags: one save of several
run_files          small files that a run keeps beside its save
signs              signs of a format that other rooms look for, too
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from msgspec import Struct

from reshard.core.catalog import Catalog
from reshard.core.findings import Finding
from reshard.core.hyperparameters import completed
from reshard.core.plan import OutputFile, Texts
from reshard.core.regex import regex
from reshard.core.state import TrainingState
from reshard.core.tensors import Entry, TensorSpec
from reshard.errors import FormatError, NotFoundError, listed
from reshard.formats.info import FormatInfo, every, named, single_for
from reshard.storage.local import Sources
from reshard.storage.paths import exists, is_folder, names

# Names in a folder of which a message may list the first.
_LOOKED_AT = 100


class Selection(Struct, frozen=True):
    """Which part of a checkpoint to read.

    `tag` names one of several saves in a folder (DeepSpeed), `prefix` the part of a nested state
    dict that is the model; DCP's reader extracts that part, for other formats `locate` does.
    `allow_step_mismatch` accepts a ZeRO-3 checkpoint whose optimizer was restarted on purpose, so
    that its step count is not the model's. `masters`: full-precision weights are read from the
    optimizer's state, in formats that say so (`FormatInfo.masters`). Without `located` a reader may
    leave out to look where in its file each tensor lies, where that takes a read for each part of
    it: the catalog then serves for a summary, and no weight can be read by it.
    """

    tag: str | None = None
    prefix: str | None = None
    allow_step_mismatch: bool = False
    role: str | None = None
    masters: bool = False
    located: bool = True


class Format(Protocol):
    """What a format's module offers."""

    def detect(self, path: Path) -> str | None:
        """Why `path` looks like this format, or None. Looks at names and first bytes only."""

    def read(self, path: Path, sources: Sources, selection: Selection) -> Catalog:
        """The table of the checkpoint's tensors, from its metadata alone.

        Every entry's fragments are proven to tile it. Raises a `ReshardError` for anything that
        is missing, damaged, mixed or not handled.
        """


#: A tensor to be laid out: what is written, what from, and the base's tensor to compare with. A
#: format that can name the same bytes more than once gives them the source's aliases, too.
TensorToWrite = tuple[TensorSpec, Entry, Entry | None]


class Writable(Protocol):
    """What the module of a format that can hold a model offers in addition."""

    def lay_out(
        self, slots: Sequence[TensorToWrite], max_file_nbytes: int, /
    ) -> tuple[tuple[OutputFile, ...], Texts]:
        """Tensor files and small files."""


class Laid(Struct, frozen=True):
    """What a layout gives: tensor files, small files, and what a user should know of them."""

    files: tuple[OutputFile, ...]
    texts: Texts = ()
    findings: tuple[Finding, ...] = ()


class StateWritable(Protocol):
    """What the module of a format that can hold training state offers in addition."""

    def lay_out_state(
        self,
        weights: Sequence[TensorToWrite],
        state: TrainingState,
        max_file_nbytes: int,
        layout: str | None,
        /,
    ) -> Laid:
        """The model's files and those of its optimizer, under the same names.

        Files of the model have the table `""`, those of the state `STATE_TABLE`, and a tensor of
        the state goes by `tensor_name` in its slots. `layout` is one of `FormatInfo.layouts`.
        Raises `PlanError` where the format cannot hold what the state has.
        """


class Description(Struct, frozen=True):
    """What a checkpoint is called in a sentence, and how it is converted, in another."""

    title: str
    advice: str


class Single(Protocol):
    """What the module of a format whose files lie beside a model offers."""

    def lay_out_file(self, name: str, slots: Sequence[TensorToWrite], /) -> OutputFile:
        """One file of that name with these tensors."""


#: What frameworks call the model's part of a nested state dict, the likeliest first.
MODEL = ("state_dict", "module", "model", "model_state_dict")
#: What they call an optimizer's part, or a folder of its own for it.
OPTIMIZER = regex(r"(.*_)?optim(izer)?s?(_.*|\d*)")
#: The top level of an optimizer's own state dict.
OPTIMIZER_KEYS = frozenset({"state", "param_groups"})
#: What they call the parts from which a run goes on, but the model.
RUN_STATE = regex(rf"{OPTIMIZER.pattern}|(lr_)?schedulers?(_.*)?|train_state|dataloader|rng(_.*)?")
#: These, and other parts that hold tensors and are not the model to read.
NOT_MODEL = regex(rf"{RUN_STATE.pattern}|extra(_.*)?|ema(_.*)?")


def load(name: str) -> Format:
    """The module of a format."""
    return cast(Format, import_module(named(name).module))


def writer(info: FormatInfo) -> Writable:
    """The module that lays out a model in a format."""
    return cast(Writable, import_module(info.module))


def state_writer(info: FormatInfo) -> StateWritable:
    """The module that lays out a model with its training state in a format."""
    return cast(StateWritable, import_module(info.module))


def as_written(info: FormatInfo, state: TrainingState, layout: str | None) -> TrainingState:
    """A state as a format's layout is written with it; what its reader will find.

    Its groups are complete (`core/hyperparameters.py`), and as the function `as_written` of the
    format's room makes them, where there is one. Raises `PlanError`.
    """
    state = completed(state)
    special = getattr(state_writer(info), "as_written", None)
    found: TrainingState = state if special is None else special(state, layout)
    return found


def index(info: FormatInfo, files: Sequence[OutputFile]) -> tuple[tuple[str, bytes], ...]:
    """The small files that distinguish a model's files from others beside them.

    None where the format's room has no function `index`: then the names of its files distinguish
    them.
    """
    special = getattr(writer(info), "index", None)
    found: tuple[tuple[str, bytes], ...] = () if special is None else special(files)
    return found


def single_writer(file: str) -> Single:
    """The module that lays out a single file of this name."""
    return cast(Single, import_module(single_for(file).module))


def claims(path: Path) -> dict[str, str]:
    """The formats that `path` looks like, each with its reason."""
    found = {name: load(name).detect(path) for name in every()}
    return {name: reason for name, reason in found.items() if reason is not None}


def meant(claimed: Iterable[str]) -> str | None:
    """Which of the formats that claim a folder to read it as; None where it could be several.

    A training checkpoint goes before a model exported beside it: the HF Trainer writes both into
    `checkpoint-N`, and the checkpoint holds the same weights in the precision of training.
    """
    names = tuple(claimed)
    found = tuple(name for name in names if not named(name).exported) or names
    return found[0] if len(found) == 1 else None


def describe(path: Path, name: str) -> Description:
    """What the checkpoint of a format at `path` is called in a sentence, and how it is converted.

    A room says it itself where its checkpoints are of several kinds.
    """
    special = getattr(load(name), "description", None)
    found: Description | None = None if special is None else special(path)
    return found or Description(named(name).title, named(name).advice)


def detect(path: Path) -> str:
    """The name of the format of what lies at `path`.

    Raises `NotFoundError` where nothing is recognised, `FormatError` where it could be of several
    formats.
    """
    if not exists(path):
        raise NotFoundError("there is no such file or folder.", path=path)
    return told(path, claims(path))


def told(path: Path, reasons: Mapping[str, str]) -> str:
    """The name of the format of what lies at `path`, from the reasons of the formats that claim it.

    Raises as `detect` does.
    """
    if not reasons and not is_folder(path):
        inside = f"Pass its folder: {path.parent}" if claims(path.parent) else None
        raise NotFoundError("this file alone is not a checkpoint.", path=path, hint=inside)
    if not reasons:
        raise NotFoundError(
            f"no checkpoint was recognised here; it holds {contents(path)}.",
            path=path,
            hint="Name the folder that holds the checkpoint's files, or the folder above it.",
        )
    found = meant(reasons)
    if found is None:
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise FormatError(
            f"it looks like more than one format ({why}).",
            path=path,
            hint="Name the folder of the one to read.",
        )
    return found


def numbered(names: Iterable[str], pattern: re.Pattern[str]) -> list[str]:
    """The names that match, by the number that the pattern's group finds in them: none is 0."""
    found = [match for name in names if (match := pattern.fullmatch(name))]
    return [match[0] for match in sorted(found, key=lambda match: int(match[1] or 0))]


def of_several(path: Path, models: Sequence[str], taken: str, what: str) -> tuple[Finding, ...]:
    """The finding on a folder that holds several models of one run; none where there is one.

    `what` is the kind of thing that the names are: a file, a folder, a tag.
    """
    others = [name for name in models if name != taken]
    if taken not in models or not others:
        return ()
    message = (
        f"{path} holds {len(models)} models of one run; {taken} was taken. To convert another, "
        f"name its {what}: {listed(others)}."
    )
    return (Finding("several-models", message, subject=taken),)


def of_role(path: Path, roles: Sequence[Path], role: str | None) -> Path:
    """The folder of the selected role among those in `path`; `path` itself where it holds none.

    Raises `NotFoundError` where there is no such role, or where there are several and none was
    named.
    """
    there = ", ".join(found.name for found in roles)
    if role is not None and role not in (found.name for found in roles):
        raise NotFoundError(
            f"there is no role {role!r} here"
            + (f"; there are {there}." if there else ": it is the checkpoint of one model."),
            path=path,
            hint="Name one of them with --role, or its folder." if there else "Leave out --role.",
        )
    if role is None and len(roles) > 1:
        raise NotFoundError(
            f"it holds the models of {len(roles)} roles: {there}.",
            path=path,
            hint="Name the one to read with --role, or its folder.",
        )
    return path / role if role is not None else next(iter(roles), path)


def read(path: Path, sources: Sources, selection: Selection) -> Catalog:
    """Detect the format of `path` and read its table of tensors."""
    return load(detect(path)).read(path, sources, selection)


def contents(path: Path) -> str:
    """The first names in a folder, in words."""
    there = names(path)
    # A folder's `/` sorts it behind its name with a dot: of those that may come first, few.
    first = sorted(name + ("/" if is_folder(path / name) else "") for name in there[:_LOOKED_AT])
    return listed([*first, *there[_LOOKED_AT:]]) or "nothing"
