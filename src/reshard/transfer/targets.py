"""Where an output will be: what a folder of this machine and one of a store do differently.

Only this module, and what it leads to, knows which of the two an output is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from msgspec import Struct

from reshard.core.locations import MANIFEST, RemotePath
from reshard.errors import NotFoundError, ReshardError, WriteError
from reshard.storage.places import Local

if TYPE_CHECKING:  # a command is to start fast, and to say what stands while a signal waits
    from reshard.storage.fingerprints import Fingerprint
    from reshard.transfer.commit import OutputFolder
    from reshard.transfer.remote import RemoteFolder

#: Of a store or a disk that does not answer.
UNKNOWN = (-1, -1)


class Order(Struct, frozen=True):
    """What will be written, and how: the plan's digest, the names of all its files, and which files
    its sources are."""

    digest: str
    names: tuple[str, ...]
    sources: Mapping[str, Fingerprint]
    overwrite: bool
    resume: bool


class Target(Protocol):
    """The path of an output, before it is written and after a run has ended."""

    def output(self, order: Order) -> OutputFolder | RemoteFolder:
        """The output, to be entered and written."""

    def lacking_space(self, nbytes: int) -> WriteError | None:
        """The error that the disk lacks room for `nbytes` bytes; None if they fit."""

    def is_unfinished(self, *, overwrite: bool) -> bool:
        """Whether a run left something under the output's name that this run goes on from.

        Raises `WriteError` where that run is alive, or where other objects lie there.
        """

    def identity(self) -> tuple[int, int] | None:
        """Which output stands there now; None: there is none. Raises nothing."""

    def can_be_continued(self) -> bool:
        """Whether an interrupted run kept what it finished. Raises nothing."""


def target_at(path: Path) -> Target:
    """The output at a path."""
    return StoreTarget(path) if isinstance(path, RemotePath) else LocalTarget(path)


def check_space(path: Path, nbytes: int) -> None:
    """Raise `WriteError` if an output of `nbytes` bytes does not fit."""
    if (lacking := target_at(path).lacking_space(nbytes)) is not None:
        raise lacking


class LocalTarget(Struct, frozen=True):
    """An output on this machine: another folder beside it until it is complete."""

    path: Path

    def output(self, order: Order) -> OutputFolder:
        from reshard.transfer.commit import OutputFolder

        return OutputFolder(
            self.path,
            order.digest,
            overwrite=order.overwrite,
            resume=order.resume,
            sources=order.sources,
        )

    def lacking_space(self, nbytes: int) -> WriteError | None:
        from reshard.transfer.commit import lacking_space

        return lacking_space(self.path, nbytes)

    def is_unfinished(self, *, overwrite: bool) -> bool:
        return False

    def identity(self) -> tuple[int, int] | None:
        try:
            there = Local(self.path).status()
        except NotFoundError:
            return UNKNOWN
        return None if there is None else (there.st_dev, there.st_ino)

    def can_be_continued(self) -> bool:
        from reshard.transfer import leftovers

        return leftovers.is_there(self.path)


class StoreTarget(Struct, frozen=True):
    """An output in a store, whose objects are written in their place."""

    path: RemotePath

    def output(self, order: Order) -> RemoteFolder:
        from reshard.transfer.remote import RemoteFolder

        return RemoteFolder(
            self.path,
            order.digest,
            order.names,
            overwrite=order.overwrite,
            resume=order.resume,
            sources=order.sources,
        )

    def lacking_space(self, nbytes: int) -> WriteError | None:
        return None

    def is_unfinished(self, *, overwrite: bool) -> bool:
        from reshard.storage import remote
        from reshard.transfer import claims

        unfinished = remote.is_unfinished(self.path)
        left = claims.left_at(self.path) if unfinished or overwrite else None
        if left is not None:
            left.check_gone(force=overwrite)
            if unfinished:
                left.check_only_ours()
        return unfinished

    def identity(self) -> tuple[int, int] | None:
        from reshard.storage.remote import identity
        from reshard.storage.stores import bucket_of

        try:
            last = bucket_of(self.path).head((self.path / MANIFEST).key)
        except ReshardError:
            return UNKNOWN
        return None if last is None else identity(last)[1:3]

    def can_be_continued(self) -> bool:
        from reshard.storage import remote

        try:
            return remote.is_unfinished(self.path)
        except ReshardError:
            return False
