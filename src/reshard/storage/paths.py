"""What lies under a path: all other rooms ask the system through these functions.

A missing file is an answer. If the system cannot say what is there (missing permission, a failing
disk, an impossible name), these functions raise a `NotFoundError` with the reason.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from stat import S_ISDIR, S_ISREG

from reshard.errors import NotFoundError
from reshard.storage.places import place_of


def status(path: Path, *, follow: bool = True) -> os.stat_result:
    """What the system says of a file or folder, or with `follow` False of the link to it.

    Raises `NotFoundError`.
    """
    there = place_of(path).status(follow=follow)
    if there is None:
        raise NotFoundError("there is no such file or folder.", path=path)
    return there


def exists(path: Path) -> bool:
    """Whether anything is there, links followed."""
    return place_of(path).status() is not None


def is_file(path: Path) -> bool:
    """Whether a regular file is there, links followed."""
    there = place_of(path).status()
    return there is not None and S_ISREG(there.st_mode)


def is_folder(path: Path) -> bool:
    """Whether a folder is there, links followed."""
    there = place_of(path).status()
    return there is not None and S_ISDIR(there.st_mode)


def is_own_folder(path: Path) -> bool:
    """Whether a folder is there, and not a link to one."""
    there = place_of(path).status(follow=False)
    return there is not None and S_ISDIR(there.st_mode)


def is_link(path: Path) -> bool:
    """Whether a link is there, wherever it leads."""
    return place_of(path).is_link()


def file_size(path: Path) -> int:
    """Bytes of a file, links followed. Raises `NotFoundError` where nothing is there."""
    return status(path).st_size


def listing(folder: Path) -> list[Path]:
    """What lies in a folder, in the order of the names. Raises `NotFoundError`."""
    return [folder / name for name in names(folder)]


def names(folder: Path) -> list[str]:
    """The names in a folder, in their order. Raises `NotFoundError`.

    For 100,000 files this takes a fifth of the time of `listing`.
    """
    return place_of(folder).names()


def own_folders(folder: Path) -> list[Path]:
    """The folders in a folder that are not links, in the order of the names.

    Raises `NotFoundError`.
    """
    return place_of(folder).own_folders()


def matching(folder: Path, pattern: str) -> list[Path]:
    """What lies in a folder under names of a pattern; nothing where there is no folder."""
    if not is_folder(folder):
        return []
    return [folder / name for name in names(folder) if fnmatchcase(name, pattern)]


def files_below(folder: Path) -> Iterator[Path]:
    """Everything below a folder that is not a folder; links to folders are included, and not
    followed. What a run keeps for itself in a store (`MARKS`) is left out.

    Raises `NotFoundError`, also where folders nest deeper than `places.MAX_DEPTH`.
    """
    return place_of(folder).below()


def real(path: Path) -> Path:
    """The absolute path with all links followed, as far as they lead; a loop of links is left.

    Raises `NotFoundError` for a name that no file can have, and for a relative path where the
    current folder is gone.
    """
    return place_of(path).real()


def absolute(path: Path) -> Path:
    """The absolute path, its links left as they are. Raises as `real` does."""
    return place_of(path).absolute()


def is_here(path: Path) -> bool:
    """Whether a path is the current folder."""
    return place_of(path).is_here()
