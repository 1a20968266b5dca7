"""Where a DeepSpeed checkpoint lies: the tag folder, and what each file's name says."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from msgspec import Struct, field
from msgspec.structs import replace

from reshard.core.locations import leads_down
from reshard.core.regex import regex
from reshard.errors import FormatError, IncompleteError, NotFoundError, UnsupportedError, listed
from reshard.formats import numbered, tags
from reshard.storage.local import Sources, child
from reshard.storage.paths import is_file, is_folder, is_link, listing, names, real

# runtime/engine.py: _get_ckpt_name, _get_zero_ckpt_name, _get_optimizer_ckpt_name,
# _get_expert_ckpt_name; runtime/pipe/module.py: ckpt_layer_path. "pp_rank" is the data parallel
# rank; mp_rank counts tensor (and pipeline) parallel ranks; an expert's "layer" counts layers with
# experts.
_MODEL = regex(r"mp_rank_(\d+)_model_states\.pt")
_MODEL_STAGE3 = regex(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_model_states\.pt")
_OPTIM = regex(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_LAYER = regex(r"layer_(\d+)(?:-model_(\d+))?-model_states\.pt")
_EXPERT = regex(r"layer_(\d+)_expert_(\d+)_mp_rank_00_model_states\.pt")
# Experts of the first releases, whose files name no layer, and of tensor parallel runs.
_OTHER_EXPERT = regex(r"(?:layer_\d+_)?expert_\d+_mp_rank_\d+_model_states\.pt")

# accelerate/accelerator.py, save_state: each of a run's models has a tag of its own in one folder.
_ACCELERATE = regex(r"pytorch_model(?:_(\d+))?")

LATEST = "latest"
LATEST_UNIVERSAL = "latest_universal"
#: The model files of a universal checkpoint: of stages 1 and 2, and of stage 3.
MODEL = "mp_rank_00_model_states.pt"
MODEL_STAGE3 = "zero_pp_rank_0_mp_rank_00_model_states.pt"
# A tag is a short name; anything longer is not DeepSpeed's file.
_MAX_LATEST = 4096
# Folders that a tag with slashes goes down, looked for above a tag folder.
_MAX_NESTED = 4
# Ranks, or experts of a layer: far more than any machine has, and few enough to count.
_MAX_COUNT = 1 << 20


class Location(Struct, frozen=True):
    """A tag folder and its files by rank: `model[(dp, mp)]`, with dp 0 below stage 3.

    `experts[(layer, expert)]` are the files of DeepSpeed's experts, `layers[layer]` those of a
    pipeline's layers. `universal`: the folder was made by ds_to_universal.
    """

    folder: Path
    tag: str
    model: dict[tuple[int, int], Path] = field(default_factory=dict)
    optim: dict[tuple[int, int], Path] = field(default_factory=dict)
    experts: dict[tuple[int, int], Path] = field(default_factory=dict)
    layers: dict[int, Path] = field(default_factory=dict)
    partitioned_model: bool = False
    universal: bool = False

    @property
    def mp_ranks(self) -> list[int]:
        """The model parallel ranks that have files, ascending."""
        return sorted({mp for _, mp in (*self.model, *self.optim)})

    @property
    def ranks(self) -> list[Location]:
        """The same folder with the files of each model parallel rank; itself where none has any."""
        parts: dict[int, Location] = {mp: replace(self, model={}, optim={}) for mp in self.mp_ranks}
        for rank, path in self.model.items():
            parts[rank[1]].model[rank] = path
        for rank, path in self.optim.items():
            parts[rank[1]].optim[rank] = path
        return list(parts.values()) or [self]


def reason(path: Path) -> str | None:
    """Why a folder looks like DeepSpeed's, or None."""
    if not is_folder(path):
        return None
    if _is_tag_folder(path):
        return "it holds DeepSpeed's model_states files"
    if is_file(path / LATEST_UNIVERSAL):
        return f"it holds {LATEST_UNIVERSAL}"
    tags = _tags(path)
    if is_file(path / LATEST) and (tags or not _has_other_weights(path)):
        return f"it holds {LATEST}"
    return f"it holds the DeepSpeed checkpoint {tags[0]}" if tags else None


def locate(path: Path, sources: Sources, tag: str | None) -> Location:
    """The tag folder that a path and a tag select, with its files classified.

    `path` is the folder with `latest` and the tag folders, or a tag folder itself. If accelerate
    saved several models, `latest` names the last; reshard takes the first. Raises `NotFoundError`
    (which lists the tags), `FormatError`, `UnsupportedError`.
    """
    if _is_tag_folder(path):
        own = _tag_of(real(path), sources)
        if tag not in (None, own):
            raise NotFoundError(
                f"it is itself a tag folder, {own!r}, and contains no tag {tag!r}.",
                path=path,
                hint=f"Name the folder above it: {path.parent}.",
            )
        return _classified(path, own)
    if tag == tags.LATEST and not is_folder(path / tag):
        tag = None
    name = _latest(path, sources) if tag is None else tags.meant(tag, _tags(path)) or tag
    if tag is None and name in (models := several_models(path)):
        name = models[0]
    if not leads_down(name):
        raise NotFoundError(
            f"{name!r} is not a tag, which is the name of a folder in this one.",
            path=path,
            hint=f"The existing tags: {tags.listed(_tags(path))}.",
        )
    folder = path
    for part in name.split("/"):
        folder = child(folder, part)
    if not _is_tag_folder(folder):
        there = tags.listed(_tags(path))
        problem = "holds no model_states files" if is_folder(folder) else "is missing"
        chosen = "" if tag is not None else f", which `{LATEST}` names,"
        raise NotFoundError(
            f"the checkpoint {name!r}{chosen} {problem}; the existing tags: {there}.",
            path=path,
            hint="The save is incomplete."
            if there == "none"
            else tags.near(name, _tags(path)) or "Name one of them with --tag.",
        )
    return _classified(folder, name)


def several_models(path: Path) -> list[str]:
    """The tags of the models that accelerate saved in a folder, where there are several."""
    if _is_tag_folder(path):
        return []
    models = numbered(_tags(path), _ACCELERATE)
    return models if len(models) > 1 else []


def _tag_of(folder: Path, sources: Sources) -> str:
    """The tag of a tag folder, by its real path: its name, or more where `latest` above says so.

    A tag may hold slashes: `epoch1/step2`.
    """
    for parent in list(folder.parents)[1:_MAX_NESTED]:
        if is_file(parent / LATEST) and not is_link(parent / LATEST):
            tag = folder.relative_to(parent).as_posix()
            if _content(parent / LATEST, sources).strip() == tag.encode():
                return tag
    return folder.name


def _content(pointer: Path, sources: Sources) -> bytes:
    """What a pointer file holds."""
    source = sources.open(pointer)
    return source.read(0, min(source.size, _MAX_LATEST))


def _latest(path: Path, sources: Sources) -> str:
    there = _tags(path)
    for pointer in (LATEST, LATEST_UNIVERSAL):
        if not is_file(path / pointer):
            continue
        try:
            name = _content(child(path, pointer), sources).decode().strip()
        except UnicodeDecodeError:
            name = ""
        if not leads_down(name):
            raise FormatError(
                f"it names {name!r}, which is not a tag." if name else "it names no tag.",
                path=path / pointer,
                hint="Pass --tag.",
            )
        return name
    if len(there) != 1:
        raise NotFoundError(
            f"there is no `{LATEST}` file, and there are several tags: {tags.listed(there)}.",
            path=path,
            hint="Name one of them with --tag.",
        )
    return there[0]


def _classified(folder: Path, tag: str) -> Location:
    model: dict[tuple[int, int], Path] = {}
    optim: dict[tuple[int, int], Path] = {}
    experts: dict[tuple[int, int], Path] = {}
    layers: dict[tuple[int, int], Path] = {}
    partitioned = False
    there = names(folder)
    universal = is_folder(folder / "zero") and not any(map(_OPTIM.fullmatch, there))
    if universal and MODEL in there and MODEL_STAGE3 in there:
        # One folder for every stage, as reshard writes it (layout.py): the same, less `module`.
        there.remove(MODEL_STAGE3)
    for name in there:
        if match := _MODEL.fullmatch(name):
            _put(model, (0, int(match[1])), folder, name)
        elif match := _MODEL_STAGE3.fullmatch(name):
            partitioned = True
            _put(model, (int(match[1]), int(match[2])), folder, name)
        elif match := _OPTIM.fullmatch(name):
            _put(optim, (int(match[1]), int(match[2])), folder, name)
        elif match := _LAYER.fullmatch(name):
            _refuse_parts(folder, name, int(match[2] or 0))
            _put(layers, (int(match[1]), 0), folder, name)
        elif match := _EXPERT.fullmatch(name):
            _put(experts, (int(match[1]), int(match[2])), folder, name)
        elif _OTHER_EXPERT.fullmatch(name):
            raise UnsupportedError(
                f"it was trained with experts of a kind whose files ({name}) are not supported: "
                "experts under tensor parallelism, or of a DeepSpeed before 0.5.",
                path=folder,
            )
    if partitioned and (0, 0) not in model:
        raise _missing_rank(folder, "model_states", [0])
    if any(_MODEL.fullmatch(path.name) for path in model.values()) and partitioned:
        raise FormatError(
            "it holds model files of two saves, with and without ZeRO-3.",
            path=folder,
            hint="Remove the files of the older save.",
        )
    numbered = {number: path for (number, _), path in layers.items()}
    return Location(folder, tag, model, optim, experts, numbered, partitioned, universal)


def _refuse_parts(folder: Path, name: str, model_rank: int) -> None:
    """Refuse a part of a pipeline's layer, which tensor parallelism split."""
    if model_rank:
        raise UnsupportedError(
            f"tensor parallelism split the layers of its pipeline ({name}), but no file states "
            "how.",
            path=folder,
            hint="Export it with the framework that trained it, as Megatron-DeepSpeed.",
        )


def _put(
    files: dict[tuple[int, int], Path], rank: tuple[int, int], folder: Path, name: str
) -> None:
    if rank in files:
        raise FormatError(
            f"two files belong to the same rank: {files[rank].name} and {name}.",
            path=folder,
            hint="They come from different saves; remove the older one.",
        )
    files[rank] = child(folder, name)


def check_written_as(path: Path, written_as: str | None) -> None:
    """A rank's file must have the name that torch wrote it under, if the file states that name.

    Nothing else in a file says which rank wrote it. Raises `FormatError` for a file that was
    renamed, or copied onto another rank's.
    """
    known = (_MODEL, _MODEL_STAGE3, _OPTIM, _EXPERT, _LAYER)
    name = f"{written_as}.pt"
    if name != path.name and any(pattern.fullmatch(name) for pattern in known):
        raise FormatError(
            f"it was written as {name} and renamed: it is the file of another rank.",
            path=path,
            hint="Copy each rank's own file under its own name.",
        )


def check_ranks(location: Location, kind: str, ranks: list[int], world_size: int | None) -> None:
    """Data parallel ranks must be 0 to `world_size` - 1, each once. Raises `IncompleteError`.

    Where the world size is not known, no rank between 0 and the last may be missing.
    """
    world_size = max(ranks) + 1 if world_size is None else world_size
    missing = absent(ranks, world_size, location.folder)
    extra = sorted(set(ranks) - set(range(world_size)))
    if missing:
        raise _missing_rank(location.folder, kind, missing, world_size, extra)
    if extra:
        raise FormatError(
            f"its files state {world_size} ranks, but there are also {kind} files of ranks "
            f"{_numbers(extra)}: files of different world sizes are mixed.",
            path=location.folder,
            hint="Remove the files that an older save left.",
        )


def absent(there: Collection[int], count: int, folder: Path) -> list[int]:
    """Which of the numbers 0 to `count` - 1 are missing, ascending."""
    if count > _MAX_COUNT:
        raise FormatError(f"its files state a number of {count} ranks or experts.", path=folder)
    return sorted(set(range(count)) - set(there))


def _missing_rank(
    folder: Path,
    kind: str,
    missing: list[int],
    world_size: int | None = None,
    extra: Sequence[int] = (),
) -> IncompleteError:
    of = f" of {world_size}" if world_size is not None else ""
    beyond = f"; {describe_extra(extra)}" if extra else ""
    return IncompleteError(
        f"the {kind} file{'s' if len(missing) > 1 else ''} of rank {_numbers(missing)}{of} "
        f"{'are' if len(missing) > 1 else 'is'} missing{beyond}.",
        path=folder,
        hint="Copy every rank's files; on several nodes without shared storage, each node has "
        "its own.",
    )


def describe_extra(extra: Sequence[int], what: str = "rank") -> str:
    """A sentence that names files of ranks that a save of this size does not have."""
    verb = "files of {}s {} are" if len(extra) > 1 else "a file of {} {} is"
    return f"{verb.format(what, _numbers(extra))} there, of another save or renamed"


def _numbers(numbers: Sequence[int]) -> str:
    return listed(map(str, numbers), 10)


def _is_tag_folder(path: Path) -> bool:
    return is_folder(path) and any(
        _MODEL.fullmatch(name)
        or _MODEL_STAGE3.fullmatch(name)
        or _OPTIM.fullmatch(name)
        or _LAYER.fullmatch(name)
        for name in names(path)
    )


def _tags(path: Path) -> list[str]:
    return sorted(folder.name for folder in listing(path) if _is_tag_folder(folder))


def _has_other_weights(path: Path) -> bool:
    return any(name.endswith((".safetensors", ".distcp", ".bin")) for name in names(path))
