"""Finding the checkpoint that a person means by a folder above it.

A path that a format claims is taken as it is. Otherwise the folders below it are searched, three
levels down and never inside a checkpoint: `results/run` leads to
`results/run/_actor/global_step6`. Of saves side by side the newest complete one is taken, and the
catalog's remarks say so; saves of different models are listed instead.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from reshard import formats
from reshard.catalog import Catalog
from reshard.errors import IncompleteError, NotFoundError
from reshard.naming.part import under
from reshard.storage import Sources, real

_DEPTH = 3
# A run's folder has tens of entries; more than this is somebody's home directory.
_MAX_FOLDERS = 10_000
# What trainers call a save: global_step6, checkpoint-500, step-100, epoch_3, iter_0000010.
_NUMBER = re.compile(r"(\d+)(?!.*\d)")
# LightRFT keeps actor and critic side by side; without a word more, the actor is meant.
_ACTOR = "_actor"


class Found(Struct, frozen=True):
    """A checkpoint below a folder; `format` is empty where two formats claim it."""

    path: Path
    format: str

    @property
    def age(self) -> tuple[int, float]:
        """Ascending with time: the number in the save's name, then when it was written."""
        number = _NUMBER.search(self.path.name)
        return (int(number[1]) if number else -1, self.path.stat().st_mtime)


def read(path: Path, sources: Sources, selection: formats.Selection) -> Catalog:
    """The catalog of the checkpoint at `path`, or of the one that is meant below it.

    Raises what the format's reader raises; `NotFoundError` where there is none, or several that
    are not saves of one run, `NamesError` where nothing lies under the prefix.
    """
    catalog = _read(path, sources, selection)
    if selection.prefix and catalog.format != "dcp":  # whose reader takes the part out itself
        catalog = replace(catalog, entries=under(catalog.entries, selection.prefix))
    return catalog


def _read(path: Path, sources: Sources, selection: formats.Selection) -> Catalog:
    if not path.is_dir() or formats.claims(path):
        return _load(path, formats.detect(path), sources, selection)
    below = saves(path)
    if not below:
        return formats.read(path, sources, selection)  # which says what is there instead
    chosen, passed_over = _choose(path, below, selection.tag), []
    for save in chosen:
        try:
            catalog = _load(save.path, save.format, sources, selection)
        except IncompleteError as error:
            passed_over.append(error)
            continue
        lost = tuple(f"passed over as incomplete: {error}" for error in passed_over)
        remark = _said(path, save, below)
        return replace(catalog, notes=(*lost, *catalog.notes), remarks=(remark,))
    raise passed_over[0]


def _load(path: Path, format_: str, sources: Sources, selection: formats.Selection) -> Catalog:
    """The checkpoint at `path`, of which only DeepSpeed's reader takes a tag: it alone keeps
    several saves in one folder."""
    tag = selection.tag
    if tag is not None and format_ != "deepspeed":
        if tag != real(path).name:
            raise NotFoundError(
                f"there is no save {tag!r} here: it is one checkpoint, not a folder of several.",
                path=path,
                hint="Leave out --tag, or name the folder above.",
            )
        selection = replace(selection, tag=None)
    return formats.load(format_).read(path, sources, selection)


def saves(path: Path) -> list[Found]:
    """Checkpoints below a folder; converted models only where there is nothing else."""
    found = list(_walk(path, _DEPTH, [_MAX_FOLDERS]))
    training = [save for save in found if save.format not in ("huggingface", "torch")]
    return training or found


def _walk(folder: Path, depth: int, budget: list[int]) -> Iterator[Found]:
    for child in sorted(folder.iterdir()):
        if not child.is_dir() or child.is_symlink() or child.name.startswith("."):
            continue
        budget[0] -= 1
        if budget[0] < 0:
            return
        claims = list(formats.claims(child))
        if claims:
            yield Found(child, claims[0] if len(claims) == 1 else "")
        elif depth > 1:
            yield from _walk(child, depth - 1, budget)


def _choose(path: Path, saves: list[Found], tag: str | None) -> list[Found]:
    """The saves to try, newest first."""
    if tag is not None:
        named = [s for s in saves if s.path.name == tag or s.format == "deepspeed"]
        if not named:
            raise _several(path, saves, f"none of its checkpoints is called {tag!r}")
        saves = named
    actors = [save for save in saves if _ACTOR in save.path.relative_to(path).parts]
    saves = actors or saves
    if len({save.path.parent for save in saves}) > 1:
        raise _several(path, saves, "it holds checkpoints of several models or runs")
    unclear = [save for save in saves if not save.format]
    if unclear:
        formats.detect(unclear[0].path)  # raises, naming both formats
    return sorted(saves, key=lambda save: save.age, reverse=True)


def _several(path: Path, saves: list[Found], what: str) -> NotFoundError:
    listed = ", ".join(str(save.path.relative_to(path)) for save in saves[:10])
    return NotFoundError(f"{what}: {listed}.", path=path, hint="Name one of them.")


def _said(path: Path, save: Found, saves: list[Found]) -> str:
    if len(saves) > 1:
        return f"of the {len(saves)} checkpoints in {path}, {save.path.name} was taken."
    return f"of {path}, the checkpoint {save.path.relative_to(path)} was taken."
