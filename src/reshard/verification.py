"""Reading a written folder again, by a reader that does not share the plan, and comparing it.

`reshard.json` holds the digest of every tensor, taken as its bytes were written. Verification
reads the folder's own headers and every byte, and must find the same tensors and digests.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from msgspec import Struct
from msgspec.structs import asdict

from reshard import manifest
from reshard.catalog import Catalog
from reshard.errors import ReshardError, VerificationError
from reshard.formats import Selection, read
from reshard.manifest import Stated
from reshard.progress import Progress
from reshard.storage import Sources, child
from reshard.tensors import Entry, blocks
from reshard.transfer.checksums import Ledger
from reshard.transfer.fill import Array, Reader, fill, page_aligned

_BLOCK = 4 << 20


class Verified(Struct, frozen=True):
    """What a verification read: all of it was as stated. Sizes are bytes.

    `num_filled` tensors are the base's and were not compared. `notes` say which checkpoint was
    taken, where the path named a folder above.
    """

    num_tensors: int
    bytes_read: int
    num_filled: int = 0
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {"verified": True, **asdict(self)}


def verify_folder(folder: Path, *, threads: int = 2, progress: Progress | None = None) -> Verified:
    """Compare every tensor of a converted folder with its digest in `reshard.json`.

    Raises `VerificationError` naming the first that differs, or a tensor that is missing or was
    added; `NotFoundError` where the folder has no `reshard.json`.
    """
    with Sources() as sources:
        stated = manifest.read(folder, sources)
        parts = [(folder, stated.tensors)] if stated.tensors else []
        parts += [(child_of(folder, name), tensors) for name, tensors in stated.beside.items()]
        found = [
            check_digests(
                read(path, sources, Selection()),
                tensors,
                sources,
                threads=threads,
                progress=progress,
            )
            for path, tensors in parts
        ]
        sources.check_unchanged()
    return Verified(sum(f.num_tensors for f in found), sum(f.bytes_read for f in found))


def child_of(folder: Path, name: str) -> Path:
    """A file that `reshard.json` names, by one name for each level below the folder."""
    for part in name.split("/"):
        folder = child(folder, part)
    return folder


def check_digests(
    catalog: Catalog,
    stated: Mapping[str, Stated],
    sources: Sources,
    *,
    threads: int,
    progress: Progress | None = None,
) -> Verified:
    """Read every tensor of a catalog and compare it with what is stated of it."""
    folder = catalog.origin.root
    for name in sorted(stated.keys() ^ catalog.entries.keys()):
        where = "is stated and not there" if name in stated else "is there and not stated"
        raise VerificationError(f"it {where}.", path=folder, tensor=name)
    total = sum(entry.spec.nbytes for entry in catalog.entries.values())
    done = 0
    counting = threading.Lock()

    def check(entry: Entry) -> None:
        nonlocal done
        _check(folder, entry, stated[entry.spec.name], sources)
        with counting:
            done += entry.spec.nbytes
            if progress is not None:
                progress(done, total)

    _in_order(check, catalog.entries.values(), threads)
    return Verified(len(catalog.entries), total)


def _in_order(check: Callable[[Entry], None], entries: Iterable[Entry], threads: int) -> None:
    """Check every entry in a few threads; raises the error of the first entry that has one."""
    remaining = deque(enumerate(entries))
    failures: dict[int, ReshardError] = {}

    def work() -> None:
        while remaining:
            try:
                place, entry = remaining.popleft()
            except IndexError:
                return  # another thread took the last
            try:
                check(entry)
            except ReshardError as error:
                failures[place] = error
                remaining.clear()

    with ThreadPoolExecutor(threads) as pool:
        try:
            for future in [pool.submit(work) for _ in range(threads)]:
                future.result()
        finally:
            remaining.clear()  # after Ctrl-C the pool waits for its threads
    if failures:
        # Entries are taken in order, and whoever had begun one came to its end.
        raise failures[min(failures)]


def _check(folder: Path, entry: Entry, want: Stated, sources: Sources) -> None:
    spec = entry.spec
    if (spec.dtype.name, spec.shape) != (want.dtype, want.shape):
        raise VerificationError(
            f"it is {spec.dtype} {spec.shape}, and {want.dtype} {want.shape} is stated.",
            path=folder,
            tensor=spec.name,
        )
    found = digest(entry, sources)
    if found != want.digest:
        raise VerificationError(
            f"its digest is {found}, and {want.digest} is stated: the bytes on disk are not those "
            "that were written.",
            path=folder,
            tensor=spec.name,
            hint="Convert again; if it recurs, the disk is at fault.",
        )


def digest(entry: Entry, sources: Sources) -> str:
    """xxh3-128 of a tensor's row-major bytes, read in blocks of 4 MiB."""
    hasher = xxhash.xxh3_128()
    for part in _stream(entry, sources):
        hasher.update(part.data)
    return hasher.hexdigest()


def equal(one: Entry, other: Entry, sources: Sources) -> bool:
    """Whether two tensors of one dtype and shape hold the same bytes; stops where they differ."""
    if (one.spec.dtype, one.spec.shape) != (other.spec.dtype, other.spec.shape):
        return False
    pairs = zip(_stream(one, sources), _stream(other, sources), strict=True)
    return all(np.array_equal(mine, theirs) for mine, theirs in pairs)


def _stream(entry: Entry, sources: Sources) -> Iterator[Array]:
    """The tensor's bytes in row-major order, a block at a time, in one buffer."""
    longest = max((fragment.extent.nbytes for fragment in entry.fragments), default=0)
    # Most tensors of a mixture of experts are far smaller than a block.
    reader = Reader(sources, Ledger(()), page_aligned(min(_BLOCK, longest)).data)
    dtype = entry.spec.dtype
    buffer = page_aligned(min(_BLOCK, entry.spec.nbytes)).view(dtype.numpy)
    for box in blocks(entry.spec.shape, len(buffer)):
        part = buffer[: box.numel]
        fill(entry, box, part, reader)
        yield part.view(np.uint8)


def read_array(entry: Entry, sources: Sources) -> Array:
    """A tensor's elements as an array of its shape."""
    spec = entry.spec
    out = np.empty(spec.numel, spec.dtype.numpy)
    start = 0
    for part in _stream(entry, sources):
        values = part.view(spec.dtype.numpy)
        out[start : start + len(values)] = values
        start += len(values)
    return out.reshape(spec.shape)
