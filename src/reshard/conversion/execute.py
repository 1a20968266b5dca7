"""Carry out a plan: write everything into a partial folder, check it, then rename it once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash
from msgspec.structs import replace

from reshard.conversion.destination import check_replaceable
from reshard.conversion.verification import verify_folder
from reshard.conversion.writing import Writing
from reshard.core.findings import Finding
from reshard.core.fragments import regions
from reshard.core.locations import MANIFEST
from reshard.core.packed import pieces
from reshard.core.plan import Plan
from reshard.core.sizes import size
from reshard.core.tensors import Extent, Fragment, Fragments, Record, Single
from reshard.progress import stage
from reshard.storage.fingerprints import Fingerprint, fingerprint
from reshard.storage.local import Sources
from reshard.transfer import memory
from reshard.transfer.cluster.connection import connected
from reshard.transfer.commit import OutputFolder
from reshard.transfer.executor import Executor, Threads
from reshard.transfer.outcome import Outcome
from reshard.transfer.output import Output, copy, put_text
from reshard.transfer.targets import Order, target_at

if TYPE_CHECKING:
    from reshard.transfer.remote import RemoteFolder


def carry_out(
    plan: Plan,
    sources: Sources,
    records: Iterable[Record],
    target: Path,
    writing: Writing,
    *,
    render: Callable[[Outcome, Mapping[str, str]], bytes],
    check: Callable[[Path], None] | None = None,
    unprotected: Sequence[Extent] = (),
) -> Outcome:
    """Write a plan's files, `reshard.json` last, and give the folder its name.

    `records` are the source's checksums, which are compared as its bytes pass, `unprotected` its
    stretches without; they are iterated over once. `render` makes the bytes of `reshard.json` from
    what the engine found and the digests of the files that were copied, by name; it may refuse what
    the engine found. Whoever holds the plan lets go of it then: verifying reads as much metadata
    again. `check` examines the finished folder before it gets its name, and raises if something is
    wrong.

    If this raises, `target` is as it was, or the error says what is there.
    """
    with (
        _output(plan, sources, target, writing) as folder,
        _executor(writing, records, unprotected, read_back=writing.verify) as executor,
    ):
        outcome = executor.run(plan, sources, folder)
        resumed = _resumed(folder, outcome, plan)
        copied = _put_beside(plan, sources, folder)
        del plan
        stated = render(outcome, copied)
        outcome = replace(outcome, digests={})
        folder.settle()  # reshard.json is the last to get its name
        folder.write(MANIFEST, stated)
        folder.settle()
        sources.check_unchanged()
        kept = stated if folder.in_order else None
        del stated
        if writing.verify:
            memory.give_back()
            verify_folder(
                folder.partial,
                leaf_digests=executor.leaf_digests(outcome.read_back),
                manifest_text=kept,
                progress=stage(writing.progress, "verify"),
            )
        if check is not None:
            check(folder.partial)
        # What was there may have changed in the hours since; that of a store is deleted by now.
        if writing.overwrite and not folder.in_order:
            check_replaceable(target, overwrite=True)
        folder.commit()
    findings = (*folder.findings, *outcome.findings, *resumed)
    return replace(outcome, findings=findings, read_back={})


def _put_beside(plan: Plan, sources: Sources, folder: Output) -> dict[str, str]:
    """Copy the base's files, whose digests are returned by name, and write the small ones."""
    copied = {
        asset.name: copy(folder, asset.name, sources.open(asset.path)) for asset in plan.assets
    }
    for name, text in plan.texts:
        put_text(folder, name, text)
    return copied


@contextmanager
def _executor(
    writing: Writing, records: Iterable[Record], unprotected: Sequence[Extent], *, read_back: bool
) -> Iterator[Executor]:
    """Who moves the bytes; a cluster that was started for it ends with the block."""
    progress = stage(writing.progress, "write")
    if writing.workers is None:
        yield Threads(writing.threads, records, read_back, progress, unprotected)
        return
    from reshard.transfer.cluster.executor import OnRay

    with connected(writing.workers) as ray:
        yield OnRay(ray, writing.workers, records, unprotected, progress)


def _output(
    plan: Plan, sources: Sources, target: Path, writing: Writing
) -> OutputFolder | RemoteFolder:
    """The output of a plan, to be entered: in a folder of this machine, or of a store."""
    names = [file.name for file in plan.files] + [asset.name for asset in plan.assets]
    order = Order(
        plan_digest(plan),
        (*names, *(name for name, _ in plan.texts)),
        _fingerprints(plan, sources),
        writing.overwrite,
        writing.resume,
    )
    return target_at(target).output(order)


def plan_digest(plan: Plan) -> str:
    """A name for the plan: of every header, every slot's source and every file that is copied."""
    hasher = xxhash.xxh3_128()
    for file in plan.files:
        hasher.update(f"{file.name}\0{file.nbytes}\0".encode())
        for offset, literal in file.literals:
            hasher.update(offset.to_bytes(8, "little") + literal)
        for slot in file.slots:
            hasher.update(f"{file.table}\0{slot.offset}\0{slot.spec}\0{slot.crc_offsets}".encode())
            for described in _described(slot.source.fragments):
                hasher.update(described.encode("utf-8", "surrogateescape"))
    for name, text in plan.texts:
        hasher.update(f"{name}\0{len(text)}\0".encode())
        for piece in pieces(text):
            hasher.update(piece)
    for asset in plan.assets:
        hasher.update(os.fsencode(f"{asset.name}\0{asset.path}\0"))
    return hasher.hexdigest()


def _described(fragments: tuple[Fragment, ...] | Fragments) -> Iterator[str]:
    """All of the fragments, as text; of those that are described by numbers, the numbers."""
    if isinstance(fragments, Fragments) and not isinstance(fragments, Single):
        yield repr(fragments)
        return
    for fragment in fragments:
        yield _text(fragment)


def _text(fragment: Fragment) -> str:
    extent, box = fragment.extent, fragment.box
    if not isinstance(extent, Extent):
        return repr(fragment)  # with all that a computed tensor is made of
    where = (extent.file, extent.offset, extent.nbytes, fragment.dtype.name, fragment.strides)
    return f"{where}{box.shape}{box.offsets}{box.sizes}"


def _fingerprints(plan: Plan, sources: Sources) -> dict[str, Fingerprint]:
    """Which files the tensors of a plan are made of, by path."""
    paths = {extent.file.path for extent in regions(slot.source for slot in plan.slots())}
    return {path: fingerprint(path, sources) for path in sorted(paths)}


def _resumed(folder: Output, outcome: Outcome, plan: Plan) -> list[Finding]:
    """The finding that an interrupted run was continued."""
    if not folder.resumed:
        return []
    total = sum(slot.spec.nbytes for slot in plan.slots())
    message = (
        f"a run that was interrupted {folder.resumed} ago was continued: {size(outcome.reused)} of "
        f"{size(total)} were there, and were read and hashed again"
    )
    if outcome.damaged:
        message += f"; pieces made again, because their bytes had changed: {outcome.damaged}"
    noted = None if folder.journal is None else folder.journal.noted
    if noted is not None and noted.damaged:
        message += "; its journal was torn or damaged, and counted up to there"
    return [Finding("resumed", f"{message}.")]
