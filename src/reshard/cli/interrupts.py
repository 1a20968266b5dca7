"""The message when a user or the system ends a run: what stands under the output's name."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from reshard.core.locations import MANIFEST, RemotePath


class Interrupted(KeyboardInterrupt):
    """A run was ended from outside; the message says what stands now."""


def writes(option: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A command whose `option` names its output; an interrupt says what stands there."""

    def wrapped(command: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(command)
        def run(**given: Any) -> Any:
            with telling_what_stands(given[option], resumable=bool(given.get("resume"))):
                return command(**given)

        return run

    return wrapped


@contextmanager
def telling_what_stands(target: Path | None, *, resumable: bool = False) -> Iterator[None]:
    """Raise `Interrupted` in place of a KeyboardInterrupt within the block.

    An output appears whole or not at all, so what stands under the name is the new output exactly
    if it is another folder than at first. None: the command writes no output. `resumable`: what is
    finished is kept.
    """
    again = "run the command again"
    before = _identity(target)
    try:
        yield
    except KeyboardInterrupt as error:
        after = _identity(target)
        if after == _UNKNOWN:
            stands = f"What stands at {target} cannot be told; run the command again."
        elif target is None:
            stands = "No output was written."
        elif after != before and after is not None:
            stands = f"The new output is complete: {target}."
        elif after is not None:
            stands = f"{target} is unchanged; {again}."
        else:
            stands = f"No output was written to {target}; {again}."
        if resumable and target is not None and after == before and _can_be_continued(target):
            stands = stands.removesuffix(f"{again}.")
            stands += f"what is finished is kept beside it: {again} to continue."
        raise Interrupted(stands) from error


def _can_be_continued(target: Path) -> bool:
    if isinstance(target, RemotePath):
        from reshard.errors import ReshardError
        from reshard.storage import remote

        try:
            return remote.is_unfinished(target)
        except ReshardError:
            return False
    from reshard.transfer import leftovers

    return leftovers.is_there(target)


# Of a store or a disk that does not answer.
_UNKNOWN = (-1, -1)


def _identity(target: Path | None) -> tuple[int, int] | None:
    if target is None:
        return None
    if isinstance(target, RemotePath):
        return _in_store(target)
    try:
        status = os.stat(target)  # noqa: PTH116 (a loop of links is an error here, on any Python)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        return None if error.errno == errno.ELOOP else _UNKNOWN
    return status.st_dev, status.st_ino


def _in_store(target: RemotePath) -> tuple[int, int] | None:
    """Which output stands in a store: that of its last object."""
    from reshard.errors import ReshardError
    from reshard.storage.remote import identity
    from reshard.storage.stores import bucket_of

    try:
        last = bucket_of(target).head((target / MANIFEST).key)
    except ReshardError:
        return _UNKNOWN
    return None if last is None else identity(last)[1:3]
