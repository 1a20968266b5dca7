"""Small files of text that are written for people: reports and pages."""

from __future__ import annotations

import secrets
from contextlib import suppress
from pathlib import Path

from reshard.errors import WriteError
from reshard.storage.local import read_start
from reshard.storage.paths import exists, is_file, real

# Bytes at the start of a page in which its mark stands.
_HEAD = 4096


def check_page(path: Path, mark: str, other: str) -> None:
    """Raise `WriteError` if a file without the mark of a page lies at `path` and would be lost;
    the message calls it `other`."""
    if not is_file(path) or mark.encode() in read_start(path, _HEAD):
        return
    raise WriteError(
        f"this file is not {other}, and is not replaced.",
        path=path,
        hint="Name another file with --html.",
    )


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all; raises `WriteError`.

    A link is followed. Into a device or a pipe the text is written as it is.
    """
    place = real(path)
    partial = place.with_name(f".{place.name}.partial-{secrets.token_hex(4)}")
    try:
        if exists(place) and not is_file(place):
            place.write_text(text, encoding="utf-8")
            return
        with partial.open("x", encoding="utf-8") as file:
            file.write(text)
        partial.replace(place)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise WriteError(f"it cannot be written: {error.strerror}.", path=path) from error
