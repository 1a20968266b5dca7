"""What a file that is not of torch.save looks like, in plain words, and its error."""

from __future__ import annotations

import struct

from reshard.errors import FormatError, IncompleteError, ReshardError, UnsupportedError

# Bytes of the file that `not_torch` looks at.
HEAD_NBYTES = 512

_DAMAGED = "The file is damaged or is not what its name says."
_KINDS = (
    (b"\x1f\x8b", "it is compressed with gzip.", "Unpack it first."),
    (b"\x28\xb5\x2f\xfd", "it is compressed with zstd.", "Unpack it first."),
    (b"GGUF", "it is a GGUF file, not a torch.save file.", _DAMAGED),
    (b"\x89HDF", "it is an HDF5 file, not a torch.save file.", _DAMAGED),
    (b"\x93NUMPY", "it is a NumPy file, not a torch.save file.", _DAMAGED),
    (b"<", "it is a web page or XML, not a torch.save file.", "Download it again."),
    (b"\x80", "it is a bare pickle, not a torch.save file.", None),
)


def not_torch(head: bytes, nbytes: int, path: str) -> ReshardError:
    """The error for a file of `nbytes` bytes that begins with `head` and is not of torch.save."""
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
        return UnsupportedError("it is a safetensors file, not a torch.save file.", path=path)
    if head[257:262] == b"ustar":
        return UnsupportedError(
            "it is a tar archive: torch.save of torch 0.1, or a packed checkpoint.",
            path=path,
            hint="Unpack it, or load and save it again with torch.",
        )
    for prefix, what, hint in _KINDS:
        if head.startswith(prefix):
            return UnsupportedError(what, path=path, hint=hint)
    return FormatError(
        f"it is not a torch.save file: it begins with {head[:8].hex(' ')}.",
        path=path,
        hint=_DAMAGED,
    )
