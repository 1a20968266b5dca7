"""Two checkpoints of any formats, tensor by tensor: `verify --against` and `diff`."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from reshard import formats
from reshard.comparison import states
from reshard.comparison.declared import DIFF, VERIFY
from reshard.comparison.pairing import (
    Pairing,
    onto_one,
    pair,
    stated_of,
    tells_names,
)
from reshard.comparison.result import Compared, Comparison
from reshard.comparison.sums import natural
from reshard.comparison.values import Method, compare
from reshard.conversion.declared import workers
from reshard.conversion.quantised import compared_as_numbers
from reshard.conversion.training import with_masters
from reshard.conversion.verification import Verified, verify_folder
from reshard.core.catalog import Catalog
from reshard.core.collecting import paused_gc
from reshard.core.findings import Finding
from reshard.core.locations import MANIFEST
from reshard.core.options import PathLike, documented, parse
from reshard.errors import (
    NamesError,
    OptionError,
    PlanError,
    ReshardError,
    VerificationError,
)
from reshard.formats import locate
from reshard.progress import Progress
from reshard.storage.local import Sources
from reshard.storage.paths import is_file

__all__ = ["Compared", "Comparison", "diff", "verify"]


@documented(DIFF)
def diff(
    first: PathLike,
    second: PathLike,
    *,
    base: PathLike | None = None,
    spectrum: bool = False,
    optimizer: bool = False,
    progress: Progress | None = None,
) -> Comparison:
    """Compare two checkpoints of any formats, tensor by tensor.

    With a `base` both are fitted onto it, as conversions would be: two saves of one run are
    compared by its names. Without, a checkpoint is fitted onto a Hugging Face folder or an output
    of reshard, on whichever side that is. Where dtypes differ, the wider is rounded to the
    narrower, and a finding says so. The files beside a model are compared too. The order of the two
    does not change the conclusion.

    Memory: a few blocks of 4 MiB, and with `spectrum` about 200 bytes for each column of a matrix.
    Raises `OptionError` for a wrong value, and another `ReshardError` where one cannot be read.
    """
    values = parse(DIFF, dict(locals()))
    with Sources() as sources:
        with paused_gc():
            mine = locate.read(values["first"], sources, formats.Selection())
            theirs = locate.read(values["second"], sources, formats.Selection())
            mine, theirs = compared_as_numbers(mine, theirs, sources)
            if values["base"] is None:
                pairing = _paired(mine, theirs, sources)
            else:
                pairing = onto_one(mine, theirs, sources, base=values["base"])
        method = Method(either=True, norms=True, spectrum=values["spectrum"])
        pairs = pairing.pairs
        said: tuple[Compared, ...] = ()
        if values["optimizer"]:
            held = states.both(mine, theirs)
            pairs = [*pairs, *states.pairs(*held)]
            said = tuple(one for one in states.settings(*held) if one.kind != "equal")
        found = compare(pairs, sources, progress, method=method)
        sources.check_unchanged()
    apart = (*said, *pairing.left, *pairing.omitted, *pairing.filled)
    findings = (*mine.findings, *theirs.findings, *found.findings)
    tensors = sorted((*found.tensors, *apart), key=lambda one: natural(one.name))
    names = (os.fspath(values["first"]), os.fspath(values["second"]))
    return Comparison(tuple(tensors), found.bytes_read, findings, found.sizes, *names)


def _paired(first: Catalog, second: Catalog, sources: Sources) -> Pairing:
    """The pairing of two checkpoints; either may decide how names correspond."""
    swapped = tells_names(first) and not tells_names(second)
    ways = [True, False] if swapped else [False, True]
    failures: list[ReshardError] = []
    for turned in ways:
        try:
            if turned:
                return pair(second, first, sources).turned()
            return pair(first, second, sources)
        except (NamesError, PlanError) as error:
            failures.append(error.with_traceback(None))  # whose frames hold all tables of the fit
    raise failures[0]


@documented(VERIFY)
def verify(
    folder: PathLike,
    against: PathLike | None = None,
    *,
    tag: str | None = None,
    prefix: str | None = None,
    role: str | None = None,
    base: PathLike | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Verified:
    """Read a converted folder again and compare every tensor, bit for bit.

    Without `against`, with the digests in its `reshard.json`; with the checkpoint `against`, with
    the checkpoint itself, read and rounded again. A folder without a config is compared without the
    base only if its names are the checkpoint's.

    Raises `OptionError` for a wrong value, `VerificationError` naming the first tensor that
    differs, `PlanError` where the base is needed.
    """
    values = parse(VERIFY, dict(locals()))
    place, threads = values["folder"], workers(values["threads"])
    if values["against"] is None:
        for name in ("tag", "prefix", "role", "base"):
            if values[name] is not None:
                raise OptionError(
                    f"--{name} selects a part of the checkpoint to compare with.",
                    hint="Pass --against.",
                    option=name,
                )
        return verify_folder(place, threads=threads, progress=progress)
    with Sources() as sources:
        stated = stated_of(place, sources)
        given = {} if stated is None else stated.options
        masters = given.get("masters") is True
        selection = formats.Selection(
            values["tag"], values["prefix"], True, values["role"], masters
        )
        source = locate.read(values["against"], sources, selection)
        if given.get("optimizer") is True and (state := source.training_state()):
            source = with_masters(source, state)
        with paused_gc():
            written = formats.read(place, sources, formats.Selection())
            source, written = compared_as_numbers(source, written, sources)
            pairing = pair(source, written, sources, base=values["base"], stated=stated)
        if pairing.by_name:
            _check_names(pairing, place)
        said = []
        pairs = pairing.pairs
        options = pairing.options
        if options is not None and options.optimizer:
            held = states.of_output(source, written, options, sources, pairing.planned)
            pairs = [*pairs, *states.pairs(*held)]
            said = [one for one in states.settings(*held, completed=True) if one.kind != "equal"]
        compared = compare(pairs, sources, progress)
        sources.check_unchanged()
    exchanged = _exchanged(place, values["against"])
    differences = (*said, *compared.differences, *pairing.left)
    for difference in differences:
        raise VerificationError(
            f"it is not what {values['against']} holds; {difference}.",
            path=folder,
            tensor=difference.name,
            hint=exchanged[0].fix
            if exchanged
            else f"{len(differences)} tensors differ, {compared.num_equal} are equal.",
        )
    if not compared.num_equal:
        raise VerificationError(
            f"none of its tensors is in {values['against']}: they are all the base's.", path=folder
        )
    findings = (*source.findings, *exchanged)
    return Verified(compared.num_equal, compared.bytes_read, len(pairing.filled), findings)


def _exchanged(folder: Path, against: Path) -> tuple[Finding, ...]:
    """The finding that a checkpoint was verified against what was made of it, and not the other way
    round.

    Then tensors are compared as if the checkpoint had been converted from its own output: what
    `reshard.json` states of a conversion, and the optimizer's state, are not.
    """
    if is_file(folder / MANIFEST) or not is_file(against / MANIFEST):
        return ()
    command = shlex.join(["reshard", "verify", str(against), "--against", str(folder)])
    message = (
        f"{against} was written by reshard, and {folder} was not: its tensors are equal to those "
        "of the output, which shows neither that all of it was converted, nor anything of an "
        "optimizer's state."
    )
    return (Finding("verify-exchanged", message, fix=f"To verify the output: {command}."),)


def _check_names(pairing: Pairing, folder: Path) -> None:
    """A folder whose names cannot be fitted must have the checkpoint's."""
    lost = sorted(name for pair in pairing.pairs for name in pair.first.keys() ^ pair.second.keys())
    if lost:
        raise PlanError(
            f"{len(lost)} names exist on one side only, such as {lost[0]!r}, and the folder does "
            "not show how names were mapped.",
            path=folder,
            hint="Pass --base, the base of the conversion. Without it, the names must be those "
            "of the checkpoint; reshard diff lists the others.",
        )
