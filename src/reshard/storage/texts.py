"""Writing one small file: whole or not at all."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

from reshard.errors import WriteError
from reshard.storage.paths import exists, is_file, real


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all; raises `WriteError`.

    A link is followed. Into a device or a pipe the text is written as it is.
    """
    place = real(path)
    partial = place.with_name(f".{place.name}.partial-{secrets.token_hex(4)}")
    try:
        if exists(place) and not is_file(place):
            with place.open("w", encoding="utf-8") as file:
                file.write(text)
            return
        with partial.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(place)
    except OSError as error:
        raise WriteError(f"cannot write the file: {error.strerror}.", path=path) from error
    finally:
        with suppress(OSError):
            partial.unlink()
