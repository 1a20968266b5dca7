"""Carry out a plan: write everything into a partial folder, check it, then rename it once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash
from msgspec import Struct
from msgspec.structs import replace

from reshard.conversion import manifest
from reshard.conversion.destination import check_replaceable
from reshard.conversion.verification import verify_folder
from reshard.core.locations import RemotePath
from reshard.core.plan import Plan
from reshard.core.tensors import Extent, Record
from reshard.progress import StagedProgress
from reshard.storage.local import Sources
from reshard.transfer.assembly import Outcome
from reshard.transfer.cluster.connection import Workers, connected
from reshard.transfer.commit import OutputFolder
from reshard.transfer.executor import Executor, Threads

if TYPE_CHECKING:
    from reshard.transfer.remote import RemoteFolder


class Writing(Struct, frozen=True):
    """How a plan is carried out; nothing here changes a byte of the output.

    `workers`: by those of a Ray cluster, instead of threads.
    """

    threads: int
    overwrite: bool = False
    verify: bool = True
    progress: StagedProgress | None = None
    workers: Workers | None = None

    def step(self, what: str) -> Callable[[int, int], None] | None:
        """The progress of one part of the work."""
        progress = self.progress
        return None if progress is None else lambda done, total: progress(what, done, total)


def carry_out(
    plan: Plan,
    sources: Sources,
    records: Iterable[Record],
    target: Path,
    writing: Writing,
    *,
    render: Callable[[Outcome], bytes],
    check: Callable[[Path], None] | None = None,
    unprotected: Sequence[Extent] = (),
) -> Outcome:
    """Write a plan's files, `reshard.json` last, and give the folder its name.

    `records` are the source's checksums, which are compared as its bytes pass, `unprotected` its
    stretches without. `render` makes the bytes of `reshard.json`; it may refuse what the engine
    found.`check` examines the finished folder before it gets its name, and raises if something is
    wrong.

    If this raises, `target` is as it was, or the error says what is there.
    """
    with (
        output(target, plan, overwrite=writing.overwrite) as folder,
        # What lies in a store is not cached here.
        _executor(
            writing, records, unprotected, read_back=writing.verify and not folder.in_order
        ) as executor,
    ):
        outcome = executor.run(plan, sources, folder)
        stated = render(outcome)
        for asset in plan.assets:
            folder.copy(asset.name, sources.open(asset.path))
        for name, text in plan.texts:
            folder.write(name, text)
        folder.settle()  # reshard.json is the last to get its name
        folder.write(manifest.MANIFEST, stated)
        folder.settle()
        sources.check_unchanged()
        if writing.verify:
            verify_folder(
                folder.partial,
                leaf_digests=executor.leaf_digests(outcome.read_back),
                manifest_text=stated if folder.in_order else None,
                progress=writing.step("verify"),
            )
        if check is not None:
            check(folder.partial)
        # What was there may have changed in the hours since; that of a store is deleted by now.
        if writing.overwrite and not folder.in_order:
            check_replaceable(target, overwrite=True)
        folder.commit()
    return replace(outcome, findings=(*folder.findings, *outcome.findings), read_back={})


@contextmanager
def _executor(
    writing: Writing, records: Iterable[Record], unprotected: Sequence[Extent], *, read_back: bool
) -> Iterator[Executor]:
    """Who moves the bytes; a cluster that was started for it ends with the block."""
    progress = writing.step("write")
    if writing.workers is None:
        yield Threads(writing.threads, records, read_back, progress, unprotected)
        return
    from reshard.transfer.cluster.executor import OnRay

    with connected(writing.workers) as ray:
        yield OnRay(ray, writing.workers, records, unprotected, progress)


def output(target: Path, plan: Plan, *, overwrite: bool) -> OutputFolder | RemoteFolder:
    """The output of a plan, to be entered: in a folder of this machine, or of a store."""
    digest = plan_digest(plan)
    if not isinstance(target, RemotePath):
        return OutputFolder(target, digest, overwrite=overwrite)
    from reshard.transfer.remote import RemoteFolder

    names = [file.name for file in plan.files] + [asset.name for asset in plan.assets]
    names += [name for name, _ in plan.texts]
    return RemoteFolder(target, digest, names, overwrite=overwrite)


def plan_digest(plan: Plan) -> str:
    """A name for the plan: of every header, every slot's source and every file that is copied."""
    hasher = xxhash.xxh3_128()
    for file in plan.files:
        hasher.update(f"{file.name}\0{file.nbytes}\0".encode())
        for offset, literal in file.literals:
            hasher.update(offset.to_bytes(8, "little") + literal)
        for slot in file.slots:
            # Of a computed tensor its repr, which holds the places of all that it is made of.
            places = [
                (f.extent.file.path, f.extent.offset) if isinstance(f.extent, Extent) else f
                for f in slot.source.fragments
            ]
            hasher.update(f"{slot.offset}\0{slot.spec.name}\0{places}\0".encode())
    for name, text in plan.texts:
        hasher.update(f"{name}\0".encode() + text)
    for asset in plan.assets:
        hasher.update(os.fsencode(f"{asset.name}\0{asset.path}\0"))
    return hasher.hexdigest()
