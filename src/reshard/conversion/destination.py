"""Check that an output may be written to its path: reshard replaces only its own outputs.

It replaces an empty folder and, with `--overwrite`, a folder that holds only what reshard wrote:

    reshard.json                     parsed as one; it lists the folder's files
    every other file is listed, and is as it was written

Small files are checked by their digests; weights are too, if their inode or content changed after
`reshard.json`, which is written last. A copied folder (`cp -r`) passes, an edited config or a
checkpoint saved into the folder does not. Folders of earlier versions list no files: nothing there
shows what was added, so they are not replaced.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path

from msgspec import Struct

from reshard import formats
from reshard.conversion import manifest
from reshard.conversion.manifest import Manifest, WrittenFile, file_digest
from reshard.conversion.verification import verify_folder
from reshard.core.locations import MANIFEST
from reshard.core.sizes import size
from reshard.errors import (
    IncompleteError,
    NotFoundError,
    ReshardError,
    WriteError,
    is_of_system,
    listed,
)
from reshard.formats import locate
from reshard.storage.local import Sources
from reshard.storage.paths import (
    exists,
    files_below,
    is_folder,
    is_here,
    is_link,
    listing,
    real,
    status,
)
from reshard.transfer.targets import target_at

# Python's own, made again from the modules beside it.
_REMADE = "__pycache__"
# A folder of such a name would be taken for a file, by users and by programs that load it.
_FILE_ENDS = (".safetensors", ".gguf")
# Names that a message lists, and files that are counted to describe a folder.
_LISTED, _MAX_COUNTED = 4, 100_000


class Replaced(Struct, frozen=True):
    """An output of reshard that a new one replaces. `nbytes` are those of all its files."""

    path: str
    num_files: int
    nbytes: int

    def __str__(self) -> str:
        return f"{self.path} (written by reshard, {size(self.nbytes)})"


class _File(Struct, frozen=True):
    """What is below a folder, by its path there with `/`."""

    name: str
    status: os.stat_result

    @property
    def regular(self) -> bool:
        return stat.S_ISREG(self.status.st_mode)


def check_destination(
    target: Path, source: Path, base: Path | None, *, overwrite: bool, replaces: bool = True
) -> Replaced | None:
    """The output of reshard that this output would replace; None where nothing is there.

    Where the command has no way to replace an output, `replaces` is False. Raises `WriteError`
    where the output is, holds or lies in an input, or would replace what reshard did not write.
    """
    if is_here(target):
        raise WriteError(
            "the output is the current folder, which a new one would replace.",
            path=target,
            hint="Name a new folder.",
        )
    check_apart(target, "source", [source])
    if base is not None:
        check_apart(target, "base model", [base])
    try:
        replaced = check_replaceable(target, overwrite=overwrite, replaces=replaces)
    except (NotFoundError, IncompleteError) as error:
        raise WriteError(
            f"the existing file or folder cannot be examined: {error.message}",
            path=error.path or target,
            hint="Name another output.",
        ) from None
    _check_outside(target, "source", source)
    if base is not None:
        _check_outside(target, "base model", base)
    if target.suffix in _FILE_ENDS and not is_folder(target):
        raise WriteError(
            f"the output is a folder, but its name ends in {target.suffix}, like that of a file.",
            path=target,
            hint="Name a new folder.",
        )
    return replaced


def check_apart(target: Path, what: str, inputs: Iterable[Path]) -> None:
    """Refuse an output that is or holds an input: replacing it would delete what is read."""
    place = real(target)
    for path in inputs:
        if real(path).is_relative_to(place):
            raise WriteError(
                f"the output is, or contains, the {what} {path}.",
                path=target,
                hint="Name a new folder.",
            )


def _check_outside(target: Path, what: str, given: Path) -> None:
    """Refuse an output inside an input: the next run would read it as a part of the input."""
    folder = real(given)
    if is_folder(folder) and real(target).is_relative_to(folder):
        raise WriteError(
            f"the output lies inside the {what}, {given}.",
            path=target,
            hint="Name a folder outside of it.",
        )


def check_replaceable(target: Path, *, overwrite: bool, replaces: bool = True) -> Replaced | None:
    """The output of reshard at `target`; None where nothing is, or an empty folder.

    Raises `WriteError` where it is not to be replaced, `NotFoundError` or `IncompleteError` where
    it cannot be examined.
    """
    if is_link(real(target)):
        raise WriteError(
            "the output is in a loop of links.", path=target, hint="Name another output."
        )
    if target_at(target).is_unfinished(overwrite=overwrite):
        return None
    if not exists(target) or (is_folder(target) and not any(listing(target))):
        return None
    if not is_folder(target):
        raise WriteError(
            "the output is a file, not a folder.", path=target, hint="Name another output."
        )
    stated = _stated(target)
    if stated is None:
        raise _not_ours(target)
    if is_link(target):
        raise WriteError(
            f"the output is a link to {real(target)}, where reshard wrote a model, and reshard "
            "replaces nothing through a link.",
            path=target,
            hint="Name that folder itself, or another output.",
        )
    if not stated.files:
        raise WriteError(
            "not replaced: an earlier version of reshard wrote this folder, and its reshard.json "
            "lists no files, so reshard cannot tell what was added since.",
            path=target,
            hint="Name another output, or remove it yourself.",
        )
    files = list(_files(target))
    foreign = _foreign(target, stated, files)
    if foreign:
        raise _mixed(target, foreign)
    found = Replaced(os.fspath(target), len(files), sum(f.status.st_size for f in files))
    if not overwrite:
        raise WriteError(
            f"the output exists: reshard wrote it, {_counted(len(files))}, {size(found.nbytes)}.",
            path=target,
            hint="Name another output, or pass --overwrite to replace it."
            if replaces
            else "Name another output.",
        )
    return found


def _stated(folder: Path) -> Manifest | None:
    """The folder's `reshard.json`; None where there is none, or a file that is not one."""
    if is_link(folder / MANIFEST):
        return None
    try:
        with Sources() as sources:
            return manifest.read(folder, sources)
    except ReshardError as error:
        if is_of_system(error):
            raise
        return None


def _files(folder: Path) -> Iterator[_File]:
    """Everything below a folder that is not a folder itself; links are not followed."""
    for path in files_below(folder):
        if not (path.parent.name == _REMADE and path.suffix == ".pyc"):
            yield _File(path.relative_to(folder).as_posix(), status(path, follow=False))


def _foreign(folder: Path, stated: Manifest, files: Iterable[_File]) -> list[str]:
    """The files of a folder that reshard did not write, or that were changed since."""
    written = status(folder / MANIFEST)
    foreign: list[str] = []
    doubtful: list[str] = []
    for file in files:
        if file.name == MANIFEST:
            continue
        # A copy that keeps the times (`cp -a`) has the older times only in `mtime`.
        late = (
            file.status.st_ctime_ns > written.st_ctime_ns
            or file.status.st_mtime_ns > written.st_mtime_ns
        )
        listed = stated.files.get(file.name)
        if not file.regular or listed is None:
            foreign.append(file.name)
        elif file.status.st_size != listed.nbytes:
            foreign.append(f"{file.name} (changed)")
        elif late or listed.digest:
            doubtful.append(file.name)
    return foreign or [f"{name} (changed)" for name in _changed(folder, stated.files, doubtful)]


def _changed(folder: Path, listed: Mapping[str, WrittenFile], names: list[str]) -> list[str]:
    """Those of the named files that do not hold what was written."""
    texts = [name for name in names if listed[name].digest]
    changed = [name for name in texts if file_digest(folder / name) != listed[name].digest]
    weights = [name for name in names if not listed[name].digest]
    if weights and not changed:
        try:
            verify_folder(folder)
        except ReshardError as error:
            if is_of_system(error):
                raise
            return weights
    return changed


def _mixed(target: Path, foreign: list[str]) -> WriteError:
    return WriteError(
        f"not replaced: reshard wrote this folder, but {_counted(len(foreign))} in it were added "
        f"or changed: {listed(foreign, _LISTED)}.",
        path=target,
        hint="Name another output, or move them out of the folder.",
    )


def _not_ours(target: Path) -> WriteError:
    what, checkpoint = description(target)
    swapped = "Are SRC and DST swapped? SRC comes first. " if checkpoint else ""
    return WriteError(
        f"the output exists and is not replaced: it is {what}, not an output of reshard.",
        path=target,
        hint=f"{swapped}Name another output, or remove it yourself.",
    )


def description(folder: Path) -> tuple[str, bool]:
    """What a folder is, in words, and whether it is or holds a checkpoint."""
    count, nbytes = 0, 0
    for file in islice(_files(folder), _MAX_COUNTED):
        count, nbytes = count + 1, nbytes + file.status.st_size
    amount = f"{'more than ' * (count == _MAX_COUNTED)}{size(nbytes)}"
    claims = formats.claims(folder)
    claimed = formats.meant(claims) if claims else None
    if claimed is not None:
        return f"{formats.describe(folder, claimed).title}, {amount}", True
    below = locate.saves(folder)
    if below or claims:
        names = listed((str(save.path.relative_to(folder)) for save in below), _LISTED)
        of_them = f" ({names})" if names else ""
        return f"a folder with {len(below) or 'several'} checkpoints{of_them}, {amount}", True
    return f"a folder with {formats.contents(folder)} ({_counted(count)}, {amount})", False


def _counted(number: int) -> str:
    return f"{number} file{'s' * (number != 1)}"
