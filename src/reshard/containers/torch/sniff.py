"""What a file looks like that is not of the kind it should be, in plain words, and its error."""

from __future__ import annotations

import struct

from reshard.errors import FormatError, IncompleteError, ReshardError, UnsupportedError

# Bytes of the file that `not_wanted` looks at.
HEAD_NBYTES = 512

_DAMAGED = "The file is damaged or is not what its name says."
_KINDS = (
    (b"\x1f\x8b", "it is compressed with gzip.", "Unpack it first."),
    (b"\x28\xb5\x2f\xfd", "it is compressed with zstd.", "Unpack it first."),
    (b"GGUF", "it is a GGUF file, not {}.", _DAMAGED),
    (b"\x89HDF", "it is an HDF5 file, not {}.", _DAMAGED),
    (b"\x93NUMPY", "it is a NumPy file, not {}.", _DAMAGED),
    (b"<", "it is a web page or XML, not {}.", "Download it again."),
    (b"PK\3\4", "it is a zip archive, as torch.save writes them, not {}.", _DAMAGED),
    (b"\x80", "it is a bare pickle, not {}.", None),
)


def not_wanted(
    head: bytes, nbytes: int, path: str, wanted: str = "a torch.save file"
) -> ReshardError:
    """The error for a file of `nbytes` bytes that begins with `head` and is not of the kind
    `wanted`."""
    if not nbytes:
        return IncompleteError(
            "the file is empty.", path=path, hint="It was never written; use another checkpoint."
        )
    if head.startswith(b"version https://git-lfs"):
        return IncompleteError(
            "it is a Git LFS pointer: the file itself was not downloaded.",
            path=path,
            hint="Run `git lfs pull` in its repository.",
        )
    if not head.strip(b"\0"):
        return IncompleteError(
            f"its first {len(head)} bytes are zero: space was reserved and never written.",
            path=path,
            hint="The save or the copy was interrupted; use another checkpoint.",
        )
    if len(head) > 8 and head[8:9] == b"{" and struct.unpack_from("<Q", head)[0] <= nbytes:
        return UnsupportedError(f"it is a safetensors file, not {wanted}.", path=path)
    if head[257:262] == b"ustar":
        return UnsupportedError(
            "it is a tar archive: torch.save of torch 0.1, or a packed checkpoint.",
            path=path,
            hint="Unpack it, or load and save it again with torch.",
        )
    for prefix, what, hint in _KINDS:
        if head.startswith(prefix):
            return UnsupportedError(what.format(wanted), path=path, hint=hint)
    return FormatError(
        f"it is not {wanted}: it begins with {head[:8].hex(' ')}.",
        path=path,
        hint=_DAMAGED,
    )
