"""Reuse or delete what an interrupted run left of an output in a store; a finding names it.

Only objects that the run's first object lists are deleted, and never those of a run that lives.
"""

from __future__ import annotations

from msgspec import Struct
from msgspec.structs import replace

from reshard.core.findings import Finding
from reshard.core.locations import MANIFEST
from reshard.errors import IncompleteError, NotFoundError
from reshard.storage import remote, uploads
from reshard.storage.stores import Object
from reshard.transfer.claims import Claim, Remains
from reshard.transfer.journal import Basis, StaleError
from reshard.transfer.notes import Notes, Put
from reshard.transfer.sending import Sending


class Takeover(Struct, frozen=True):
    """What of it is reused: the journal, and the objects of files, by name; the run's age.

    `marks` are the objects of the journal that are there.
    """

    findings: tuple[Finding, ...] = ()
    journal: Notes | None = None
    kept: dict[str, Object] = {}
    age: str = ""
    marks: frozenset[str] = frozenset()


def over(claim: Claim, left: Remains, *, complete: bool) -> Claim:
    """The first object of a run that takes over: what is left is its to delete.

    Raises `WriteError` where objects lie there that the run did not write.
    """
    if not complete:
        left.check_only_ours()
    old = {*claim.old, *left.claim.names} - {*claim.files}
    return replace(claim, old=tuple(sorted(old)))


def take(
    sending: Sending, left: Remains, basis: Basis, put: Put, *, resume: bool, complete: bool
) -> Takeover:
    """Take over what a run left that is gone, or whose output is `complete`.

    `put` writes the objects of a journal that is continued. Raises `WriteError` where what is left
    cannot be deleted.
    """
    marks = {name for name in left.there if Notes.is_one(name)}
    begun = uploads.begun(sending.target, sorted(left.claim.names))
    ended = begun is not None and uploads.end(sending.target, begun)
    if complete:  # it was killed before it replaced an output, or after it was done
        _delete(sending, marks)
        return Takeover()
    reason, which = "", ""
    if resume:
        try:
            journal, kept = _resumed(sending, left, basis, put, marks)
        except StaleError as error:
            reason, which = str(error), error.source
        else:
            _delete(sending, {*left.files} - {*kept})
            return Takeover((), journal, kept, left.age, frozenset(marks))
    _delete(sending, {*left.files, *marks})
    what = f"an interrupted run of this output left {left.described}"
    if begun:
        what += f", and {len(begun)} uploads that were not ended"
    if not ended:
        what += " (uploads that were not ended cannot be looked for here)"
    if resume:
        cause = f"{reason}: {which}" if which else reason
        found = Finding("not-resumed", f"{what}, but nothing of it can be reused: {cause}.",
                        subject=which)  # fmt: skip
    else:
        found = Finding("partial-output", f"{what}; it was deleted.", subject=str(sending.target))
    return Takeover((found,))


def _resumed(
    sending: Sending, left: Remains, basis: Basis, put: Put, marks: set[str]
) -> tuple[Notes, dict[str, Object]]:
    """The journal, and the files that it says to be complete and that are still those objects."""
    if not marks:
        raise StaleError("nothing of it was finished")
    if left.claim.plan != basis.plan:
        raise StaleError("its plan is another")
    try:
        texts = {name: remote.read_whole(sending.target / name)[0] for name in sorted(marks)}
    except (NotFoundError, IncompleteError) as error:
        raise StaleError(f"its journal cannot be read ({error.message})") from None

    journal = Notes(put, basis, texts)
    sealed = {} if journal.noted is None else journal.noted.sealed
    kept = {}
    for name, line in sealed.items():
        there = sending.still(name, left.there.get(name), Object(line.nbytes, line.tag))
        if there is not None:
            kept[name] = there
    return journal, kept


def _delete(sending: Sending, names: set[str]) -> None:
    sending.bucket.delete([sending.key(name) for name in sorted(names - {MANIFEST})])
