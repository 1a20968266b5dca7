"""The user's four commands: each parses its flags and calls the library."""

from __future__ import annotations

from pathlib import Path

from reshard import formats
from reshard.errors import UnsupportedError
from reshard.formats import huggingface, locate
from reshard.storage.local import snapshot

# The command that converts a format.
_COMMANDS = {
    "dcp": "Convert it with fsdp2hf.",
    "deepspeed": "Convert it with ds2hf.",
    "huggingface": "Convert it with hf2fsdp.",
    "ranks": "Convert it with fsdp2hf.",
    "adapter": "Merge it with: reshard convert SRC DST --base BASE --fill-from-base.",
    "torch": "Convert it with: reshard convert SRC DST --base BASE.",
}


def expect(path: Path, *wanted: str) -> None:
    """Raise `UnsupportedError` where `path`, or all below it, is of a format that the command does
    not convert."""
    path = snapshot(path)
    claims = formats.claims(path)
    if path.is_dir() and not claims:
        formats_below = [save.format for save in locate.saves(path)]
        if not formats_below or set(formats_below) & {*wanted, ""}:
            return  # which of them is meant, or what is there instead, is said when it is read
        found = formats_below[0]
    else:
        found = formats.detect(path)
    if found == "huggingface" and huggingface.is_adapter(path):
        found = "adapter"
    if found not in wanted:
        is_wanted = formats.TITLES[wanted[0]]
        is_found = formats.TITLES.get(found, formats.ADAPTER_TITLE)
        elsewhere = _COMMANDS[found]
        below = [s for s in locate.saves(path) if s.format in wanted] if path.is_dir() else []
        if {*wanted} & claims.keys():
            elsewhere += " It also holds an exported model: name the file of that to convert it."
        newest = max(below, key=lambda save: save.age, default=None)
        raise UnsupportedError(
            f"it is {is_found}, not {is_wanted}.",
            path=path,
            hint=elsewhere if newest is None else f"Below it there is one: {newest.path}.",
        )
