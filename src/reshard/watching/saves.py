"""The saves of a run, and whether a save is complete.

A save is complete if all of these are true:

    the run says so    `latest` (DeepSpeed) or latest_checkpointed_iteration.txt (Megatron-LM, verl)
                       names it or a later one, or was written after it; where there is such a file
    it is quiet        no file of it was added or changed since the last look
    it can be read     the format's reader finds every rank's file and every byte that they state;
                       a DCP save has its .metadata, which is written last

The last is found by converting it: what is incomplete gives an error and no output.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import xxhash
from msgspec import Struct

from reshard import formats
from reshard.core.regex import regex
from reshard.errors import NotFoundError, OptionError, listed
from reshard.formats import locate, tags
from reshard.storage.local import read_start
from reshard.storage.paths import files_below, is_file, is_folder, listing, status

# The names of a step's folder: global_step10, checkpoint-500, iter_0000010, step_5, epoch_2.
_STEP = regex(r"(?i)(?:.*[^a-z])?(?:step|checkpoint|ckpt|iter(?:ation)?|epoch|save)s?[_\-=.]?\d+")
_NUMBERED = regex(r".*\d")
# Bytes of a file that names the last save.
_MAX_NBYTES = 256


class Save(Struct, frozen=True):
    """A save of a run: its name, and the path to convert."""

    name: str
    path: Path


def age(name: str) -> tuple[int, str]:
    """A key of saves' names that ascends with the steps."""
    return tags.number_of(name), name


def saves_of(run: Path) -> list[Save]:
    """The saves that a run's folder has now, the first step first.

    Raises `NotFoundError` where it holds saves of several runs or models, `OptionError` where it is
    a single checkpoint.
    """
    if not is_folder(run):
        return []
    claims = formats.claims(run)
    if claims:
        if not locate.has_tags(formats.meant(claims)):
            raise OptionError(
                "it is one checkpoint, not the folder of a run.",
                path=run,
                hint="Name the folder above it, or convert it: reshard convert SRC DST.",
                option="run",
            )
        paths = _tags(run)
    else:
        paths = []
        for save in locate.actors(locate.saves(run), run):
            folder_of_tags = locate.has_tags(save.format) and tags.number_of(save.path.name) < 0
            paths += _tags(save.path) if folder_of_tags else [save.path]
    return _named(run, paths)


def _tags(folder: Path) -> list[Path]:
    """The saves in a folder of several."""
    return [child for child in listing(folder) if is_folder(child) and formats.claims(child)]


def _named(run: Path, paths: Iterable[Path]) -> list[Save]:
    saves: dict[str, Save] = {}
    above: dict[Path, None] = {}
    for path in paths:
        at = _step(path.relative_to(run).parts)
        above[Path(*path.relative_to(run).parts[:at])] = None
        name = path.relative_to(run).parts[at]
        # Within one step the model comes first: its optimizer's folder is not a save.
        saves.setdefault(name, Save(name, path))
    if len(above) > 1:
        raise NotFoundError(
            f"it holds saves of several models or runs: {listed(map(str, above))}.",
            path=run,
            hint="Name one of them.",
        )
    return sorted(saves.values(), key=lambda save: age(save.name))


def _step(parts: Sequence[str]) -> int:
    """Which part of a path is the step's."""
    for pattern in (_STEP, _NUMBERED):
        for at, part in enumerate(parts):
            if pattern.fullmatch(part):
                return at
    return len(parts) - 1


def fingerprint(save: Save) -> str:
    """What changes when a file of the save is added, changed or removed; no content is read."""
    digest = xxhash.xxh3_128()
    for path in _files(save.path):
        try:
            found = status(path, follow=False)
        except NotFoundError:  # it was deleted meanwhile
            continue
        digest.update(f"{path}\0{found.st_size}\0{found.st_mtime_ns}\n".encode(errors="replace"))
    return digest.hexdigest()


def unfinished(save: Save, run: Path) -> str:
    """Why the run itself does not call the save finished; empty where it does, or says nothing."""
    marker = _marker(save.path, run)
    if marker is None:
        return ""
    text = read_start(marker, _MAX_NBYTES).decode(errors="replace").strip()
    if text == save.name or tags.number_of(text) >= tags.number_of(save.name):
        return ""
    written = status(marker).st_mtime_ns
    if all(status(path).st_mtime_ns <= written for path in _files(save.path)):
        return ""
    return f"{marker.name} names {text}"


def _marker(path: Path, run: Path) -> Path | None:
    """The file above a save, up to the run's folder, that names the last finished one."""
    for folder in path.parents:
        for name in (tags.LATEST, locate.TRACKER):
            if is_file(folder / name):
                return folder / name
        if folder == run:
            break
    return None


def _files(path: Path) -> Iterable[Path]:
    return files_below(path) if is_folder(path) else [path]
