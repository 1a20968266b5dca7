"""Two checkpoints of any formats, tensor by tensor: `verify --against` and `diff`."""

from __future__ import annotations

import os
from pathlib import Path

from reshard import formats
from reshard.comparison.pairing import Pairing, pair
from reshard.comparison.values import Comparison, Difference, compare
from reshard.conversion.verification import Verified, verify_folder
from reshard.errors import OptionError, PlanError, VerificationError
from reshard.formats import locate
from reshard.progress import Progress
from reshard.storage.local import Sources

__all__ = ["Comparison", "Difference", "diff", "verify"]

PathLike = str | os.PathLike[str]


def diff(first: PathLike, second: PathLike, *, progress: Progress | None = None) -> Comparison:
    """Compare two checkpoints of any formats, tensor by tensor.

    The second's names count: where the first has others and the second is a Hugging Face folder
    with a config, the first is fitted onto it, as a conversion would be. Values are compared after
    rounding to the second's dtypes. The files beside a model are compared too.

    Memory: a few blocks of 4 MiB. Raises a `ReshardError` where one cannot be read.
    """
    with Sources() as sources:
        mine = locate.read(Path(first), sources, formats.Selection())
        theirs = locate.read(Path(second), sources, formats.Selection())
        pairing = pair(mine, theirs, sources)
        found = compare(pairing.pairs, sources, progress)
        sources.check_unchanged()
    apart = (*pairing.left, *pairing.omitted, *pairing.filled)
    findings = (*mine.findings, *theirs.findings)
    return Comparison(found.num_equal, (*found.differences, *apart), found.bytes_read, findings)


def verify(
    folder: PathLike,
    against: PathLike | None = None,
    *,
    tag: str | None = None,
    prefix: str | None = None,
    role: str | None = None,
    base: PathLike | None = None,
    threads: int = 2,
    progress: Progress | None = None,
) -> Verified:
    """Read a converted folder again and compare every tensor, bit for bit.

    Without `against`, with the digests in its `reshard.json`; with the checkpoint `against` that
    it was converted from (`tag`, `prefix` and `role` as for `convert`), with the checkpoint itself,
    read and rounded anew. `base` is the model that it was converted onto; without it, tensors that
    the conversion took from its base are counted and not compared, and a folder without a config is
    compared only if its names are the checkpoint's.

    Raises `VerificationError` naming the first tensor that differs, `PlanError` where the base is
    needed.
    """
    if against is None:
        if any(chosen is not None for chosen in (tag, prefix, role, base)):
            raise OptionError(
                "--tag, --prefix, --role and --base choose what to compare with.",
                hint="Pass --against.",
            )
        return verify_folder(Path(folder), threads=threads, progress=progress)
    with Sources() as sources:
        source = locate.read(Path(against), sources, formats.Selection(tag, prefix, True, role))
        written = formats.read(Path(folder), sources, formats.Selection())
        pairing = pair(source, written, sources, base=None if base is None else Path(base))
        if pairing.by_name:
            _check_names(pairing, Path(folder))
        found = compare(pairing.pairs, sources, progress)
        sources.check_unchanged()
    differences = (*found.differences, *pairing.left)
    for difference in differences:
        raise VerificationError(
            f"it is not what {os.fspath(against)} holds; {difference}.",
            path=folder,
            tensor=difference.name,
            hint=f"{len(differences)} tensors differ, {found.num_equal} are equal.",
        )
    if not found.num_equal:
        raise VerificationError(
            f"none of its tensors is in {os.fspath(against)}: they are all the base's.", path=folder
        )
    return Verified(found.num_equal, found.bytes_read, len(pairing.filled), source.findings)


def _check_names(pairing: Pairing, folder: Path) -> None:
    """A folder whose names cannot be fitted must have the checkpoint's."""
    lost = sorted(name for pair in pairing.pairs for name in pair.first.keys() ^ pair.second.keys())
    if lost:
        raise PlanError(
            f"{len(lost)} names are on one side only, {lost[0]!r} among them, and the folder alone "
            "does not tell how names were changed.",
            path=folder,
            hint="Pass --base, the model that it was converted onto. Without one, names must be "
            "the checkpoint's; reshard diff lists those that are not.",
        )
