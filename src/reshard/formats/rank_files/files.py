"""Which files of a folder are the ranks' of one model, and whether they are all of one save.

    named by the user                        what is read
    run/global_step_7/actor                  the rank files in it
    run/global_step_7                        those of its one role folder, or of the role named
    .../actor/model_world_size_4_rank_0.pt   that world's rank files in its folder

A folder with `latest_checkpointed_iteration.txt` or several steps is `formats.locate`'s matter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from msgspec import Struct

from reshard.core.regex import regex
from reshard.errors import FormatError, IncompleteError, NotFoundError, brief, listed
from reshard.formats import numbered, of_role
from reshard.storage import strict_json
from reshard.storage.local import Sources, child
from reshard.storage.paths import is_file, is_folder, listing, names, own_folders

_VERL = regex(r"(?P<model>model)_world_size_(?P<world>\d{1,7})_rank_(?P<rank>\d{1,7})\.pt")
_ACCELERATE = regex(r"(?P<model>pytorch_model_fsdp(?:_\d+)?)_rank_?(?P<rank>\d{1,7})\.bin")
_OTHER = regex(
    r"(?P<model>.*?)[._-]?rank[._-]?(?P<rank>\d{1,7})(?:[._-]of[._-](?P<world>\d{1,7}))?"
    r"\.(?:pt|pth|bin|ckpt)"
)
# Other files that trainers save once per rank.
_NOT_MODEL = regex(
    r"(.*[._-])?(optim(izer)?s?|extra|rng|random|scheduler|sched|dataloader|data|sampler|trainer|"
    r"client|grad|ema)([._-].*|\d*)"
)
_OPTIMIZER = regex(r"(.*[._-])?optim(izer)?s?([._-].*|\d*)")
# Files of another format, whose folders may hold other files of a rank.
_FOREIGN = (".metadata", ".distcp", ".safetensors", "_model_states.pt", "_optim_states.pt")
# What every rank's file has in its name.
_SIGN = "rank"
_CONFIG = "fsdp_config.json"
_NUMBER = regex(r".*?(\d*)")
_LISTED = 5


class Missing(Struct, frozen=True):
    """Missing files of ranks: how many, and the first of them."""

    count: int
    names: tuple[str, ...]

    def __str__(self) -> str:
        more = self.count - len(self.names)
        return ", ".join(self.names) + (f" and {more} more" if more else "")


NOTHING_MISSING = Missing(0, ())


class Saved(Struct, frozen=True):
    """The rank files of one model: `files` by rank.

    `world` is the number of ranks as names and config state it, None where they do not; then the
    tensors do. `models` has a file of each model of the folder, of which `model` was taken; none
    where the user named one.
    """

    folder: Path
    writer: str
    files: Mapping[int, Path]
    world: int | None
    model: str
    models: tuple[str, ...]

    def missing(self, world: int) -> Missing:
        """The files that a world of so many ranks has and this folder lacks."""
        some = next(iter(self.files.values())).name
        found = re.match(r"(.*rank[._-]?)\d+(.*)", some, re.DOTALL)
        before, after = found.groups() if found else (some, "")
        # A name or a file may state any world: the first few lie among the first ranks.
        ranks = range(min(world, len(self.files) + _LISTED))
        names = [f"{before}{rank}{after}" for rank in ranks if rank not in self.files]
        return Missing(world - len(self.files), tuple(names[:_LISTED]))

    def check_ranks(self, world: int) -> None:
        """Refuse a rank that a world of so many does not have."""
        beyond = max(self.files)
        if beyond >= world:
            raise FormatError(
                f"it belongs to rank {beyond}, but there are {world} ranks: files of two saves "
                "are mixed.",
                path=self.files[beyond],
                hint="Keep the files of one save.",
            )


class _File(Struct, frozen=True):
    path: Path
    writer: str
    model: str
    world: int | None
    rank: int


def why(path: Path) -> str | None:
    """Why `path` looks like rank files, or None."""
    if is_file(path):
        mine = _parse(path)
        if mine is None or mine not in _of_folder(path.parent):
            return None
        return f"it is the file of rank {mine.rank}"
    found = _of_folder(path)
    if found:
        return f"it holds {found[0].path.name}"
    roles = _roles(path)
    return f"it holds {roles[0].name}/{_of_folder(roles[0])[0].path.name}" if roles else None


def find(path: Path, role: str | None, sources: Sources) -> Saved:
    """The rank files that a file, a role's folder or the folder of roles selects.

    Raises `NotFoundError`, `FormatError`, `IncompleteError`.
    """
    named = _parse(path) if is_file(path) else None
    folder = path.parent if named is not None else path
    found = _of_folder(folder)
    if not found:
        folder = of_role(path, _roles(path), role)
        found = _of_folder(folder)
    elif role is not None and role != folder.name:
        raise NotFoundError(
            f"there is no role {role!r} here: these are the files of one model.",
            path=folder,
            hint="Leave out --role, or name the folder above.",
        )
    models = numbered(sorted({file.model for file in found}), _NUMBER)
    model = models[0] if named is None else named.model
    if named is None and len(models) > 1 and found[0].writer == "torch":
        raise NotFoundError(
            f"it holds the rank files of several models: {listed(models, _LISTED)}.",
            path=folder,
            hint="Name a file of the one to read.",
        )
    mine = [file for file in found if file.model == model]
    world = _world(folder, mine, None if named is None else named.world)
    if named is None and mine[0].writer == "verl":
        world = _agreed(folder, world, sources)
    files = _by_rank(file for file in mine if file.world == world or file.world is None)
    names = {file.model: file.path.name for file in reversed(found)}
    models = [names[each] for each in models] if named is None else []
    saved = Saved(folder, mine[0].writer, files, world, names[model], tuple(models))
    if world is not None:
        saved.check_ranks(world)
    return saved


def optimizers(saved: Saved) -> dict[str, dict[int, Path]]:
    """The optimizers' files by rank, beside the model's: one series, or several of a script."""
    if saved.writer == "verl":
        named = {
            rank: path.with_name(path.name.replace("model_", "optim_", 1))
            for rank, path in saved.files.items()
        }
        there = {rank: path for rank, path in named.items() if is_file(path)}
        return {"optim": there} if there else {}
    found: dict[str, dict[int, Path]] = {}
    for path in listing(saved.folder):
        match = _OTHER.fullmatch(path.name)
        name = "" if match is None else match["model"]
        others = saved.writer == "accelerate" and name != optimizer_folder(saved)
        if match is not None and _OPTIMIZER.fullmatch(name) and is_file(path) and not others:
            found.setdefault(name, {})[int(match["rank"])] = path
    return found


def optimizer_folder(saved: Saved) -> str:
    """What accelerate calls the optimizer of a model, of which it may save several."""
    number = _NUMBER.fullmatch(saved.model.partition("_rank")[0].partition("fsdp")[2])
    return f"optimizer_{number[1] or 0}" if number else "optimizer_0"


def _of_folder(folder: Path) -> list[_File]:
    """The rank files of a folder, those of a known trainer before any other's."""
    if not is_folder(folder):
        return []
    there = names(folder)
    mine = [folder / name for name in there if _SIGN in name]
    found = [file for path in mine if (file := _parse(path)) is not None]
    known = [file for file in found if file.writer != "torch"]
    if known:
        return [file for file in known if file.writer == known[0].writer]
    if any(name.endswith(_FOREIGN) for name in there):
        return []
    models = {file.model for file in found}
    ranks = {model: {file.rank for file in found if file.model == model} for model in models}
    # One such file alone is most often a whole state dict that rank 0 wrote.
    return [file for file in found if len(ranks[file.model]) > 1]


def _parse(path: Path) -> _File | None:
    for writer, pattern in (("verl", _VERL), ("accelerate", _ACCELERATE), ("torch", _OTHER)):
        match = pattern.fullmatch(path.name)
        if match is None:
            continue
        if _NOT_MODEL.fullmatch(match["model"]):
            return None
        stated = match.groupdict().get("world")
        world = None if stated is None else int(stated)
        return _File(path, writer, match["model"], world, int(match["rank"]))
    return None


def _roles(folder: Path) -> list[Path]:
    """The folders of a step's models, one a role; verl's only."""
    if not is_folder(folder):
        return []
    below = own_folders(folder)
    return [path for path in below if any(file.writer == "verl" for file in _of_folder(path))]


def _world(folder: Path, files: list[_File], selected: int | None) -> int | None:
    """The world that the files' names state. Raises `IncompleteError` where they state two."""
    worlds: dict[int | None, _File] = {}
    for file in sorted(files, key=lambda file: (file.world or 0, file.rank)):
        worlds.setdefault(file.world, file)
    if selected is not None:
        return selected
    if len(worlds) > 1:
        both = " and ".join(str(world) for world in worlds)
        first = next(iter(worlds.values())).path.name
        raise IncompleteError(
            f"it holds rank files of two saves, with {both} ranks.",
            path=folder,
            hint=f"Name a file of the save to read ({first}), or move the others away.",
        )
    return next(iter(worlds), None)


def _agreed(folder: Path, world: int | None, sources: Sources) -> int | None:
    """The world, compared with verl's `fsdp_config.json` if there is one (since mid-2025)."""
    path = folder / _CONFIG
    if not is_file(path):
        return world
    config = strict_json.read_object(sources.open(child(folder, _CONFIG)))
    if "world_size" not in config:
        raise FormatError("it does not state a world_size.", path=path)
    stated = config["world_size"]
    if type(stated) is not int or stated != world:
        raise IncompleteError(
            f"{_CONFIG} states {brief(stated)} ranks, but the rank files have a world size of "
            f"{world}: files of two saves are mixed, or those of the last save are missing.",
            path=folder,
            hint="Copy the whole folder again, or name a rank's file of the save to read.",
        )
    return world


def _by_rank(files: Iterable[_File]) -> dict[int, Path]:
    found: dict[int, Path] = {}
    for file in files:
        other = found.setdefault(file.rank, file.path)
        if other != file.path:
            raise FormatError(
                f"{other.name} belongs to rank {file.rank} too.",
                path=file.path,
                hint="Keep the files of one save.",
            )
    return found
