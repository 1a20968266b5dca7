"""Where a checkpoint, a base or an output lies: a path of this machine, or the URL of a store.

    s3://BUCKET/KEY                     Amazon S3, and what speaks its protocol
    gs://BUCKET/KEY                     Google Cloud Storage
    az://CONTAINER/KEY                  Azure Blob Storage
    https://HOST/KEY                    a web server; to read
    hf://OWNER/NAME[@REVISION]/FILE     a model of the Hugging Face hub; to read

A URL becomes a `RemotePath`: what readers do with paths (`folder / name`, `.name`, `.parent`) works
as it does for local ones, and only `storage` distinguishes the two.
"""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path, PosixPath
from urllib.parse import unquote

from reshard.core.regex import regex
from reshard.errors import OptionError, shown

#: The stores that can be written, and those that are only read.
WRITABLE = ("s3", "gs", "az")
HUB = "hf"
READABLE = (*WRITABLE, HUB, "https", "http")
#: The file of an output that lists the others; it is written last.
MANIFEST = "reshard.json"
#: What stands in an output in a store while it is written, and how the names begin of all that a
#: run keeps there for itself.
CLAIM = "reshard.partial.json"
MARKS = "reshard.partial."

# By one slash too: `pathlib` makes `s3:/bucket` of `s3://bucket`.
_URL = regex(
    r"([A-Za-z][\w+.-]*)://(.*)|(s3a?|gs|gcs|az|abfss?|hf|hdfs|https?|file):/(.*)", re.DOTALL
)
_LOOPBACK = regex(r"(localhost|127\.\d+\.\d+\.\d+|\[::1\])(:\d+)?")
# Parts of a URL that name no object: the scheme and the bucket; on the hub, owner and model.
_ROOT = {HUB: 3}
# What `pathlib` would drop from a path, or climb by.
_NOT_NAMES = frozenset({"", ".", ".."})


class RemotePath(PosixPath):
    """The place of an object, or of objects below it, in a store; the text is its URL.

    The parts are the scheme with its colon, the bucket, and the components of the key. Methods that
    ask the file system raise `OSError`: `reshard.storage.paths` answers instead.
    """

    def __str__(self) -> str:
        scheme, *rest = self.parts or (".",)
        if scheme[:-1] not in READABLE or not scheme.endswith(":"):
            return "/".join(self.parts) or "."  # a path relative to another
        return f"{scheme}//{'/'.join(rest)}"

    def __fspath__(self) -> str:
        return str(self)

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    @property
    def scheme(self) -> str:
        """The store's kind: s3, gs, az, hf, https."""
        return self.parts[0][:-1]

    @property
    def bucket(self) -> str:
        """The bucket or host; of a model on the hub, `owner/name@revision`."""
        return "/".join(self.parts[1 : _ROOT.get(self.scheme, 2)])

    @property
    def key(self) -> str:
        """The object's name in its bucket, with `/`; empty for the bucket itself."""
        return "/".join(self.parts[_ROOT.get(self.scheme, 2) :])

    @property
    def is_root(self) -> bool:
        """Whether it is a whole bucket, or above one."""
        return len(self.parts) <= _ROOT.get(self.scheme, 2)

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        raise OSError(errno.ENOTSUP, "it is an object of a store", str(self))

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        raise OSError(errno.ENOTSUP, "it is an object of a store", str(self))


def located(path: str) -> Path:
    """The path of a text that one of ours was turned into: a `RemotePath`'s, or an absolute one."""
    scheme, found, rest = path.partition("://")
    if found and scheme in READABLE:
        return RemotePath(f"{scheme}:", *filter(None, rest.split("/")))
    return Path(path)


def leads_down(name: str) -> bool:
    """Whether a name with `/` leads down from a folder, and by one way alone."""
    return not _NOT_NAMES & {*name.split("/")}


#: How often a URL was parsed: each time a user names one, what was known of stores is asked again.
_named = 0


def named() -> int:
    """Counts the URLs that users named; what a store said before the last is out of date."""
    return _named


def location(text: str, *, remote: bool = False, writes: bool = False) -> Path:
    """The path that a user names. With `remote` URLs are taken, with `writes` those of stores that
    can be written.

    Raises `OptionError` for any other URL: as a path it would be a folder called `s3:`. What it
    says of a URL holds no password and no signature.
    """
    match = _URL.match(text)
    if match is None:
        return Path(text)
    scheme, rest = (match[1] or match[3]).lower(), match[2] if match[1] else match[4]
    bare = f"{scheme}://{_without_secrets(rest)}"
    if not remote:
        raise OptionError(
            f"{shown(bare)} is a URL, but this must be a local path.",
            hint="Name a local path; for a mounted store, the folder where it is mounted.",
        )
    if scheme == "file":
        raise OptionError(f"{shown(bare)} is a URL of a local file.", hint="Name its path.")
    if scheme not in READABLE:
        raise OptionError(
            f"{shown(bare)} is a URL of an unsupported kind.",
            hint="Supported are s3://, gs://, az://, hf:// and https://. For a mounted store, "
            "name the folder where it is mounted.",
        )
    if writes and scheme not in WRITABLE:
        raise OptionError(
            f"{shown(bare)} can only be read; it cannot be an output.",
            hint="Name an output in s3://, gs:// or az://, or a local folder.",
        )
    return _parsed(scheme, rest, bare)


def _parsed(scheme: str, rest: str, bare: str) -> RemotePath:
    global _named
    authority = rest.partition("/")[0]
    if re.search(r"[?#]", rest) or ("@" in authority and scheme != HUB):
        raise OptionError(
            f"{shown(bare)} contains a password, a signature or a query.",
            hint="Leave it out; the store's own settings hold credentials (docs/remote.md).",
        )
    if scheme == "http" and not _LOOPBACK.fullmatch(authority):
        raise OptionError(
            f"{shown(bare)} would be read without encryption.", hint="Name it by https://."
        )
    parts = (unquote(rest) if scheme.startswith("http") else rest).rstrip("/").split("/")
    root = _ROOT.get(scheme, 2)
    if len(parts) < root - 1 or _NOT_NAMES & {*parts}:
        raise OptionError(
            f"{shown(bare)} names no place in a store.",
            hint="Write it as hf://OWNER/NAME or hf://OWNER/NAME@REVISION."
            if scheme == HUB
            else "Write it as s3://BUCKET/FOLDER, without empty names, `.` and `..`.",
        )
    _named += 1
    return RemotePath(f"{scheme}:", *parts)


def _without_secrets(rest: str) -> str:
    """A URL's text after the scheme, without what may be secret."""
    authority, slash, key = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
    return authority.rpartition("@")[2] + slash + key
