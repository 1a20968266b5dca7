"""Opening and reading a checkpoint's files: positional reads, identities, names that stay inside.

Files are read with `pread`, never mapped: a file that shrinks while it is read must give an
error, not a SIGBUS. A file's identity (device, inode, size, modification time) is taken when it
is first opened and checked again by `Sources.check_unchanged` when the work is done.
"""

from __future__ import annotations

import os
import re
import resource
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

from reshard.core.locations import located
from reshard.core.tensors import FileRef
from reshard.errors import FormatError, IncompleteError, NotFoundError, brief, listed
from reshard.storage import frames
from reshard.storage.paths import absolute, exists, is_file, is_folder, is_link, listing, real
from reshard.storage.source import (
    Expanded,
    Identity,
    RemoteSource,
    Source,
    changed,
    close_read,
    identity_of,
    open_regular,
)

# Descriptors kept open: the two files of each of 2,000 ranks. A file beyond them is opened again
# for each read (about 10 us).
_MAX_OPEN = 4096
# Bytes of a file name on any system.
MAX_NAME = 255
# Bytes of a file that holds one name.
_MAX_POINTER = 4096
# Compressed frames kept expanded, each in a temporary file. Readers take a frame's bytes in order
# and do not come back, so a few for each thread will do.
_MAX_EXPANDED = 16
# Files that are parsed only as tensors: a link to another such file can reveal only tensors.
_WEIGHTS = (".safetensors", ".bin")
# What a model is called on the hub, <owner>/<name>.
_HUB_NAME = r"\w[\w.-]*/\w[\w.-]*"
# A repository's folder in the Hugging Face cache: models--<owner>--<name>.
_CACHED = "models--"


class Sources:
    """The input files of one run, each opened once and closed together.

    Safe to use from several threads. A compressed frame is expanded into an unnamed temporary file,
    so memory does not grow with it; the last few frames are kept. `known` are the identities that
    files had when they were seen before: a file that changed since is an `IncompleteError`.
    `elsewhere`: on another machine, whose numbers of devices are others.
    """

    def __init__(
        self, known: Mapping[str, Identity] | None = None, *, elsewhere: bool = False
    ) -> None:
        self._known = known or {}
        self._compared = slice(1 if elsewhere else 0, None)
        self._open: dict[FileRef, Source] = {}
        self._expanded: OrderedDict[FileRef, Expanded] = OrderedDict()
        self._lock = threading.Lock()
        self._max_open = _max_open()

    def open(self, file: FileRef | str | Path) -> Source:
        """The file, opened. Raises `NotFoundError`, `FormatError` (not a regular file)."""
        if not isinstance(file, FileRef):
            file = FileRef(str(absolute(located(file) if isinstance(file, str) else file)))
        ref = file
        self._reach(ref.path)
        with self._lock:
            if ref.codec:
                return self._frame(ref)
            return self._whole(ref.path)

    def stream(self, ref: FileRef) -> Iterator[bytes]:
        """The bytes of a compressed frame, decompressed in pieces of at most 1 MiB."""
        self._reach(ref.path)
        with self._lock:
            source = self._whole(ref.path)
        yield from frames.pieces(source.read_some, ref)

    def _reach(self, path: str) -> None:
        """Open an object of a store before the lock is taken: its store may take long to
        answer."""
        ref = FileRef(path)
        if not path.startswith("/") and ref not in self._open:
            source = self._plain(ref)
            with self._lock:
                self._open.setdefault(ref, source)

    def _whole(self, path: str) -> Source:
        ref = FileRef(path)
        source = self._open.get(ref)
        if source is None:
            source = self._open[ref] = self._plain(ref)
        return source

    def _frame(self, ref: FileRef) -> Source:
        source = self._expanded.get(ref)
        if source is None:
            source = self._expand(ref)
            while len(self._expanded) >= _MAX_EXPANDED:
                # It is closed when the last thread that reads it lets go of it.
                self._expanded.popitem(last=False)
            self._expanded[ref] = source
        self._expanded.move_to_end(ref)
        return source

    def _plain(self, ref: FileRef) -> Source:
        if not ref.path.startswith("/"):
            from reshard.storage import remote

            opened = remote.opened(ref.path)
            which = remote.identity(opened.known)
            self._check_known(ref.path, which)
            return RemoteSource(ref, opened, which)
        fd, now = open_regular(ref.path)
        try:
            self._check_known(ref.path, identity_of(now))
        except IncompleteError:
            close_read(fd)
            raise
        keep = len(self._open) < self._max_open
        if not keep:
            close_read(fd)
        return Source(ref, fd if keep else None, identity_of(now), now.st_size)

    def _check_known(self, path: str, now: Identity) -> None:
        known = self._known.get(path, now)
        if known[self._compared] != now[self._compared]:
            raise IncompleteError(
                "the file changed after the checkpoint was opened.",
                path=path,
                hint="Open the checkpoint again once nothing writes to it.",
            )

    def _expand(self, ref: FileRef) -> Expanded:
        plain = self._whole(ref.path)
        import tempfile  # takes 3 ms, and few files have frames

        out = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the source)
        for piece in frames.pieces(plain.read_some, ref):
            out.write(piece)
        out.flush()
        return Expanded(ref, out, plain.identity)

    def paths(self) -> list[Path]:
        """The files that were opened so far."""
        return [located(ref.path) for ref in self._open]

    def identities(self) -> dict[str, Identity]:
        """What the files that were opened so far are, by path; `Sources(known)` takes it."""
        return {ref.path: source.identity for ref, source in self._open.items()}

    def check_unchanged(self) -> None:
        """Raise `IncompleteError` if a file that was read is no longer the file it was."""
        urls = [ref.path for ref in self._open if not ref.path.startswith("/")]
        if urls:
            from reshard.storage import remote

            remote.forget_all(urls)
        for source in self._open.values():
            if source.identity_now() != source.identity:
                raise changed(source.ref.path)

    def close(self) -> None:
        for source in self._open.values():
            source.close()
        self._open.clear()
        self._expanded.clear()

    def __enter__(self) -> Sources:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def snapshot(folder: Path) -> Path:
    """The model in a repository's folder of the Hugging Face cache; any other folder is itself.

        models--org--name/snapshots/<commit>/    a model folder, of links to blobs/
        models--org--name/refs/main              the commit that was last downloaded

    (huggingface_hub 2.4, file_download.py.) A path where nothing is that reads like a name on the
    hub, `org/name`, is that model in the cache. Raises `NotFoundError` where it is not clear which.
    """
    if not exists(folder):
        folder = cached(str(folder)) or folder
    if not all(is_folder(folder / name) for name in ("blobs", "snapshots")):
        return folder
    there = {path.name: path for path in listing(folder / "snapshots") if is_folder(path)}
    main = folder / "refs" / "main"
    named = _commit(main) if is_file(main) else ""
    if named in there:
        return there[named]
    if len(there) == 1:
        return next(iter(there.values()))
    snapshots = listed(sorted(there)) or "none"
    raise NotFoundError(
        f"it is a repository in the Hugging Face cache; its snapshots are: {snapshots}.",
        path=folder / "snapshots",
        hint="Name the folder of one of them." if there else "Download the model again.",
    )


def read_start(path: Path, nbytes: int) -> bytes:
    """The first `nbytes` of a small file, or all of it. Raises as `Sources` does."""
    with Sources() as sources:
        source = sources.open(path)
        return source.read(0, min(source.size, nbytes))


def _commit(pointer: Path) -> str:
    """The commit that a file of `refs` names. Raises `FormatError` for one that is not a
    pointer."""
    with Sources() as sources:
        source = sources.open(pointer)
        if source.size > _MAX_POINTER:
            raise FormatError(
                f"it has {source.size} bytes, and holds the name of a commit alone.",
                path=pointer,
                hint="Download the model again, or name the folder below snapshots.",
            )
        return source.read(0, source.size).decode("utf-8", "replace").strip()


def cached(name: str) -> Path | None:
    """The folder of a model that is called by its name on the hub, if it is in the cache.

    Where the cache is: huggingface_hub 2.4, constants.py.
    """
    if not re.fullmatch(_HUB_NAME, name):
        return None
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE", f"{home}/hub")).expanduser()
    folder = cache / (_CACHED + name.replace("/", "--"))
    return folder if is_folder(folder) else None


def download(path: Path) -> str | None:
    """How a model that is not here is downloaded, if the path can be a name on the hub."""
    if not re.fullmatch(_HUB_NAME, str(path)) or exists(path.parent):
        return None
    return f"It is not in the Hugging Face cache either. If it is on the hub: hf download {path}"


def child(folder: Path, name: str, *, store: bool = False) -> Path:
    """`folder/name`, for a name that a file of the checkpoint states.

    Raises `FormatError` unless `name` is one plain path component that stays inside the folder. A
    link out of the folder is refused, save those of the Hugging Face cache, whose snapshots link to
    `models--*/blobs`. With `store`, links that people make to a model store are accepted too: to a
    file of the same name, to weights of the same kind, or into a folder of blobs.
    """
    if not _is_plain(name):
        raise FormatError(
            f"it names the file {brief(name)}, which is not a plain file name.",
            path=folder,
            hint="The checkpoint is damaged or was crafted to mislead.",
        )
    path = folder / name
    if is_link(path):
        target = real(path)
        in_cache = target.parent.name == "blobs" and target.parent.parent.name.startswith(_CACHED)
        in_cache = in_cache or (store and _in_store(name, target))
        if not in_cache and not target.is_relative_to(real(folder)):
            raise FormatError(
                f"it is a link that leaves the folder, to {target}.",
                path=path,
                hint="Put the file itself in the folder.",
            )
    return path


def _in_store(name: str, target: Path) -> bool:
    """Whether a link's target is the file that its name says."""
    same_kind = Path(name).suffix in _WEIGHTS and target.suffix == Path(name).suffix
    return target.name == name or target.parent.name == "blobs" or same_kind


def _is_plain(name: str) -> bool:
    """Whether a name is one component of a path, and such that a file may have."""
    try:
        raw = os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return (
        name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"} and len(raw) <= MAX_NAME
    )


def _max_open() -> int:
    """At most half of the descriptors that the system allows: by default 1024, on macOS 256."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MAX_OPEN if allowed == resource.RLIM_INFINITY else min(_MAX_OPEN, allowed // 2)
