"""Make a run's own folder and those above it, or continue with an interrupted run's."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from reshard.core.findings import Finding
from reshard.errors import ReshardError, WriteError
from reshard.transfer import leftovers
from reshard.transfer.journal import Basis, Journal, StaleError
from reshard.transfer.system import Identity, identity, sync_folder


def make_parents(target: Path, folders: list[tuple[Path, Identity]]) -> None:
    """Make the folders above the target, and append them: a failed run removes them again."""
    missing = []
    folder = target.parent
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for folder in reversed(missing):
        with suppress(FileExistsError):  # another run makes it at the same time
            folder.mkdir()
            folders.append((folder, identity(folder.lstat())))
            sync_folder(folder.parent)


def refuse_existing(target: Path, *, overwrite: bool, restored: bool = False) -> None:
    """Raise `WriteError` where `target` exists and holds anything, unless it may be replaced.

    `restored`: it was just put back from where a killed run had moved it.
    """
    if target.is_dir():
        if overwrite or not any(target.iterdir()):
            return
    elif not target.exists():
        return
    kind = "folder exists and is not empty" if target.is_dir() else "is a file, not a folder"
    back = " A run that was killed had moved it aside; it is back in its place." * restored
    raise WriteError(f"the output {kind}.{back}", path=target, hint="Name another output.")


def begin(own: Path, target: Path, basis: Basis) -> tuple[Identity, Journal]:
    """Make the folder of a run. Raises `WriteError` where something has its name, `OSError`."""
    try:
        own.mkdir(0o700)
    except FileExistsError:
        raise _stands(own, target) from None
    known = identity(own.lstat())
    try:
        leftovers.mark(own, target)
        (own / "tmp").mkdir()
        (own / "new").mkdir()
        return known, Journal.begin(own / leftovers.JOURNAL, basis)
    except BaseException:
        leftovers.remove_tree(own, known)
        raise


def take_up(
    own: Path, target: Path, basis: Basis
) -> tuple[Identity, Journal, str] | Finding | None:
    """The folder of an interrupted run, its journal, and its age in words.

    None where there is no such folder of this user. Where nothing of it can be reused it is
    removed, and a finding says why. Raises `WriteError` where a process that lives writes into it,
    `OSError`.
    """
    if not leftovers.is_ours(own, target):
        return None
    known, source = identity(own.lstat()), ""
    journal: Journal | None = None
    try:
        journal = Journal.resume(own / leftovers.JOURNAL, basis)
        age = leftovers.age(own)
        if leftovers.gather(own):
            return known, journal, age
        reason = "its files do not lie as reshard leaves them"
    except BlockingIOError:
        raise _stands(own, target) from None
    except StaleError as error:
        reason, source = str(error), error.source
    except OSError as error:
        reason = f"its journal or files cannot be used ({error.strerror or error})"
    if journal is not None:
        journal.close()
    what = leftovers.described(own)
    if failed := leftovers.remove_tree(own, known):
        raise failed
    which = f": {source}" if source else ""
    return Finding(
        "not-resumed",
        f"an interrupted run of this output left {what}, but nothing of it can be reused: "
        f"{reason}{which}.",
        subject=source,
    )


def can_be_continued(error: BaseException | None) -> bool:
    """Whether what is finished is of use after an error: an interrupt, a disk without room.

    A `WriteError` is given a hint that says so, unless it has another.
    """
    if not isinstance(error, ReshardError):
        return error is not None
    if not isinstance(error, WriteError):
        return False  # of the input, or of the values that were made
    if error.hint is None:
        error.hint = "What is finished is kept: once it can be written, pass --resume again."
    return True


def _stands(own: Path, target: Path) -> WriteError:
    if leftovers.is_ours(own, target):
        return WriteError(
            "another process writes into it.",
            path=own,
            hint="Wait for it to end, or name another output.",
        )
    return WriteError(
        "it is in the place where this run must write, but no run of this user created it.",
        path=own,
        hint="Remove it, or name another output.",
    )
