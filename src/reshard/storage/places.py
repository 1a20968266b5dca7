"""What the system or a store says about a path: two implementations of one set of questions.

Only this room knows which of the two a path is; `paths` words the answers for all others.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from stat import S_ISLNK
from typing import Protocol

from msgspec import Struct

from reshard.core.locations import RemotePath
from reshard.errors import NotFoundError

#: Levels of folders below one that is walked. Real ones have three.
MAX_DEPTH = 64
# There is nothing under the name: a part of the path is absent, or a file, or a loop of links.
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


class Place(Protocol):
    """A path that can be asked about. All methods raise `NotFoundError` where the answer cannot be
    had."""

    def status(self, *, follow: bool = True) -> os.stat_result | None:
        """What `os.stat` says, or with `follow` False `os.lstat`; None where nothing is there."""

    def is_link(self) -> bool:
        """Whether a link is there, wherever it leads."""

    def names(self) -> list[str]:
        """The names in the folder, in their order."""

    def own_folders(self) -> list[Path]:
        """The folders in the folder that are not links, in the order of the names."""

    def below(self, depth: int = MAX_DEPTH) -> Iterator[Path]:
        """Everything below the folder that is not a folder; links are not followed."""

    def real(self) -> Path:
        """The absolute path with all links followed."""

    def absolute(self) -> Path:
        """The absolute path, its links left as they are."""

    def is_here(self) -> bool:
        """Whether it is the current folder."""


def place_of(path: Path) -> Place:
    """The questions about a path, to the system or to the store that it lies in."""
    if isinstance(path, RemotePath):
        from reshard.storage.remote import Stored  # paths of this machine need nothing of it

        return Stored(path)
    return Local(path)


class Local(Struct, frozen=True):
    """A path of this machine."""

    path: Path

    def status(self, *, follow: bool = True) -> os.stat_result | None:
        try:
            return os.stat(self.path, follow_symlinks=follow)  # noqa: PTH116 (one call for both)
        except OSError as error:
            if error.errno in _ABSENT:
                return None
            raise NotFoundError(
                f"it cannot be accessed: {error.strerror}.", path=self.path
            ) from error
        except ValueError:  # a NUL, or half of a surrogate pair: no file has such a name
            return None

    def is_link(self) -> bool:
        there = self.status(follow=False)
        return there is not None and S_ISLNK(there.st_mode)

    def names(self) -> list[str]:
        try:
            return sorted(os.listdir(self.path))  # noqa: PTH208 (pathlib's iterator opens late)
        except OSError as error:
            raise self._unlisted(error) from error

    def own_folders(self) -> list[Path]:
        try:
            with os.scandir(self.path) as there:  # which knows the kinds: no status is asked for
                names = sorted(one.name for one in there if one.is_dir(follow_symlinks=False))
        except OSError as error:
            raise self._unlisted(error) from error
        return [self.path / name for name in names]

    def below(self, depth: int = MAX_DEPTH) -> Iterator[Path]:
        if not depth:
            raise NotFoundError(f"folders nest deeper than {MAX_DEPTH} levels.", path=self.path)
        folders = set(self.own_folders())
        for name in self.names():
            path = self.path / name
            if path in folders:
                yield from Local(path).below(depth - 1)
            else:
                yield path

    def real(self) -> Path:
        try:
            # `Path.resolve` raises RuntimeError for a loop.
            return Path(os.path.realpath(self.path))
        except OSError as error:
            raise self._without_here(error) from None
        except ValueError:
            raise NotFoundError("no file can have this name.", path=self.path) from None

    def absolute(self) -> Path:
        try:
            return self.path.absolute()
        except OSError as error:
            raise self._without_here(error) from None

    def is_here(self) -> bool:
        try:
            here = Path.cwd()
        except OSError:
            return False
        return self.real() == here

    def _unlisted(self, error: OSError) -> NotFoundError:
        return NotFoundError(f"the folder cannot be listed: {error.strerror}.", path=self.path)

    def _without_here(self, error: OSError) -> NotFoundError:
        return NotFoundError(
            f"it is relative to the current folder, which cannot be found: {error.strerror}.",
            path=self.path,
            hint="Change into a folder that exists, or name the whole path.",
        )
