"""Read a written folder again, with a reader that does not share the plan, and compare it.

`reshard.json` holds the digest of every tensor, taken as its bytes were written. Verification
reads the folder's own headers and every byte, and must find the same tensors and digests.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct, field
from msgspec.structs import asdict, replace

from reshard.conversion import manifest
from reshard.conversion.assets import names_weights
from reshard.conversion.manifest import Manifest, Stated
from reshard.core.catalog import Catalog
from reshard.core.digests import LEAF_NBYTES, joined, leaves
from reshard.core.findings import Finding
from reshard.core.locations import MANIFEST
from reshard.core.tensors import Entry
from reshard.errors import VerificationError, brief
from reshard.formats import Selection, read
from reshard.progress import Progress
from reshard.storage.local import Sources, child
from reshard.storage.paths import is_file, listing
from reshard.transfer.executor import LeafDigests, in_threads
from reshard.transfer.reading import plain_digest
from reshard.transfer.threads import in_order


class Verified(Struct, frozen=True):
    """What a verification read: all of it was as stated. Sizes are bytes.

    `num_filled` tensors are the base's and were not compared. `findings` are the source's, which
    checkpoint was taken among them where the path named a folder above.
    """

    num_tensors: int
    bytes_read: int
    num_filled: int = 0
    findings: tuple[Finding, ...] = ()

    def to_json(self) -> dict[str, Any]:
        findings = [finding.to_json() for finding in self.findings]
        return {"verified": True, **asdict(self), "findings": findings}


def verify_folder(
    folder: Path,
    *,
    threads: int = 2,
    leaf_digests: LeafDigests | None = None,
    manifest_text: bytes | None = None,
    progress: Progress | None = None,
) -> Verified:
    """Compare every tensor of a converted folder with its digest in `reshard.json`.

    `leaf_digests` reads the tensors; without, `threads` threads of this process do.
    `manifest_text` is that of a `reshard.json` which is not in its place yet.

    Raises `VerificationError` naming the first that differs, or a tensor that is missing or was
    added; `NotFoundError` where the folder has no `reshard.json`.
    """
    with Sources() as sources:
        if manifest_text is None:
            stated = manifest.read(folder, sources)
        else:
            stated = manifest.parsed(manifest_text, folder / MANIFEST)
        check_listed(folder, stated)
        check_run(folder, stated)
        parts = [(folder, stated.tensors)] if stated.tensors else []
        parts += [(child_of(folder, name), tensors) for name, tensors in stated.beside.items()]
        results = []
        for path, listed in parts:
            catalog = read(path, sources, Selection())
            checks = [(catalog, listed)]
            if path == folder:
                _check_aliases(catalog, stated.names.get("aliases", {}))
                checks += _state(catalog, stated)
            for table, tensors in checks:
                results.append(
                    check_digests(
                        table,
                        tensors,
                        sources,
                        threads=threads,
                        trees=stated.version >= manifest.TREES,
                        leaf_digests=leaf_digests,
                        progress=progress,
                    )
                )
        sources.check_unchanged()
    return Verified(sum(f.num_tensors for f in results), sum(f.bytes_read for f in results))


def _state(catalog: Catalog, stated: Manifest) -> list[tuple[Catalog, Mapping[str, Stated]]]:
    """The moments as a table of their own; steps and groups are compared here."""
    if not stated.state:
        return []
    folder = catalog.origin.root
    state = catalog.training_state()
    if state is None:
        raise VerificationError(
            "its training state is missing, although reshard.json lists it.", path=folder
        )
    found = manifest.run_of(state)
    for what in ("steps", "groups"):
        if found[what] != stated.run.get(what):
            raise VerificationError(
                f"the {what} of its optimizer differ from those in {MANIFEST}.",
                path=folder,
                hint="Convert again.",
            )
    entries = {entry.spec.name: entry for entry in state.entries(masters=False)}
    return [(replace(catalog, entries=entries), stated.state)]


def check_listed(folder: Path, stated: Manifest) -> None:
    """Raise `VerificationError` where a folder has weights that its `reshard.json` does not list.

    Otherwise a model without stated tensors would be skipped, and only the files beside it
    compared.
    """
    listed = stated.files or stated.beside
    if stated.tensors and not stated.files:
        return  # an earlier version, which did not list the model's files
    for path in listing(folder):
        if names_weights(path.name) and is_file(path) and path.name not in listed:
            raise VerificationError(
                f"{MANIFEST} does not list this file.",
                path=path,
                hint="Move it away, or convert again: what is not listed cannot be verified.",
            )


def check_run(folder: Path, stated: Manifest) -> None:
    """Raise `VerificationError` unless the schedule, the counters and the other files of a run that
    lie beside its training state are those that were written.
    """
    if not stated.state:
        return
    for name, written in stated.files.items():
        if not written.digest or not name.endswith(".pt"):
            continue
        path = child_of(folder, name)
        if not is_file(path):
            raise VerificationError("it was written with the training state, but it is missing.",
                                    path=path, hint="Convert again.")  # fmt: skip
        if manifest.file_digest(path) != written.digest:
            raise VerificationError(
                f"its bytes differ from those that {MANIFEST} states.",
                path=path,
                hint="Convert again.",
            )


def child_of(folder: Path, name: str) -> Path:
    """A file that `reshard.json` names, by one name for each level below the folder."""
    for part in name.split("/"):
        folder = child(folder, part)
    return folder


def _check_aliases(catalog: Catalog, stated: object) -> None:
    """Compare the other names of the same bytes with those that are stated."""
    found = {alias: name for name, entry in catalog.entries.items() for alias in entry.aliases}
    if not isinstance(stated, dict):
        raise VerificationError("it is damaged.", path=catalog.origin.root / MANIFEST)
    for alias in sorted(found.keys() | stated.keys()):
        if found.get(alias) != stated.get(alias):
            raise VerificationError(
                f"it is another name of {brief(found.get(alias))} in the folder, but of "
                f"{brief(stated.get(alias))} in reshard.json.",
                path=catalog.origin.root,
                tensor=alias,
            )


def check_digests(
    catalog: Catalog,
    stated: Mapping[str, Stated],
    sources: Sources,
    *,
    threads: int,
    trees: bool = True,
    leaf_digests: LeafDigests | None = None,
    progress: Progress | None = None,
) -> Verified:
    """Read every tensor of a catalog and compare it with what is stated of it.

    `trees`: whether the digests are trees (`core.digests`). `leaf_digests` as for `verify_folder`.
    """
    folder = catalog.origin.root
    same = stated.keys() == catalog.entries.keys()
    for name in () if same else sorted(stated.keys() ^ catalog.entries.keys()):
        where = (
            "is missing, although reshard.json lists it"
            if name in stated
            else "is not listed in reshard.json"
        )
        raise VerificationError(f"it {where}.", path=folder, tensor=name)
    checks = (_Check(entry, stated[name]) for name, entry in catalog.entries.items())
    total = sum(entry.spec.nbytes for entry in catalog.entries.values())
    checking = _Checking(folder, total, progress)
    if trees:
        hash_leaves = leaf_digests or in_threads(threads)
        hash_leaves(checking.leaves(checks), sources, checking.found)
    else:
        in_order(lambda check: checking.whole(check, sources), checks, threads)
    return Verified(len(catalog.entries), checking.total)


class _Check(Struct):
    """A tensor that is checked, what is stated of it, and the digests of its leaves so far."""

    entry: Entry
    want: Stated
    found: dict[int, bytes] = field(default_factory=dict)


class _Checking:
    """A table of tensors that is checked, leaf by leaf, in any order. Safe to use from threads."""

    def __init__(self, folder: Path, total: int, progress: Progress | None) -> None:
        self.total = total
        self._folder = folder
        self._progress = progress
        self._done = 0
        self._reading: dict[int, tuple[_Check, int]] = {}
        self._counting = threading.Lock()

    def leaves(self, checks: Iterable[_Check]) -> Iterator[tuple[Entry, int]]:
        """What is to be read, a leaf at a time; one of a tensor without any."""
        place = 0
        for check in checks:
            _check_spec(self._folder, check)
            for leaf in range(max(1, leaves(check.entry.spec))):
                self._reading[place] = check, leaf
                yield check.entry, leaf
                place += 1

    def found(self, place: int, digest: bytes) -> None:
        """Note the digest of the leaf that `leaves` gave at that place."""
        check, leaf = self._reading.pop(place)
        spec = check.entry.spec
        with self._counting:
            check.found[leaf] = digest
            count = max(1, leaves(spec))
            complete = len(check.found) == count
        self._count(min(spec.nbytes - leaf * LEAF_NBYTES, LEAF_NBYTES))
        if complete:
            digests = [check.found[index] for index in range(count)]
            check.found.clear()
            _compare(self._folder, check, joined(digests))

    def whole(self, check: _Check, sources: Sources) -> None:
        """Read a tensor whose digest is no tree."""
        _check_spec(self._folder, check)
        found = plain_digest(check.entry, sources)
        self._count(check.entry.spec.nbytes)
        _compare(self._folder, check, found)

    def _count(self, nbytes: int) -> None:
        with self._counting:
            self._done += nbytes
            if self._progress is not None:
                self._progress(self._done, self.total)


def _check_spec(folder: Path, check: _Check) -> None:
    spec, want = check.entry.spec, check.want
    if (spec.dtype.name, spec.shape) != (want.dtype, want.shape):
        raise VerificationError(
            f"it is {spec.dtype} {spec.shape}, but reshard.json states {want.dtype} {want.shape}.",
            path=folder,
            tensor=spec.name,
        )


def _compare(folder: Path, check: _Check, digest: str) -> None:
    if digest != check.want.digest:
        raise VerificationError(
            f"it has changed since it was written: its digest is {digest}, and reshard.json states "
            f"{check.want.digest}.",
            path=folder,
            tensor=check.entry.spec.name,
            hint="Convert again. If it happens again, check the disk.",
        )
