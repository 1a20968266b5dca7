"""LightRFT's four scripts as commands: each parses its flags and calls the library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reshard import formats
from reshard.cli.progress import shown_progress
from reshard.errors import UnsupportedError
from reshard.formats import locate
from reshard.formats.info import every, named
from reshard.storage.local import snapshot
from reshard.storage.paths import is_folder


def carry_out(script: str, source: Path, target: Path, **options: Any) -> None:
    """Convert as LightRFT's script of this name does, and show the report; `options` are those of
    `convert`."""
    from reshard.cli.commands import show_report
    from reshard.conversion.convert import convert

    expect(source, script)
    with shown_progress() as progress:
        report = convert(source, target, progress=progress, **options)
    show_report(report, options.get("base"))


def expect(path: Path, script: str) -> None:
    """Raise `UnsupportedError` where `path`, or all below it, is of a format that LightRFT's script
    of this name does not convert."""
    accepted = [info.name for info in every().values() if script in info.scripts]
    path = snapshot(path)
    claims = formats.claims(path)
    if is_folder(path) and not claims:
        formats_below = [save.format for save in locate.saves(path)]
        if not formats_below or set(formats_below) & {*accepted, ""}:
            return  # which of them is meant, or what is there instead, is said when it is read
        found = formats_below[0]
    else:
        found = formats.told(path, claims) if claims else formats.detect(path)
    is_found = formats.describe(path, found)
    # An adapter is of the format, and no model.
    if found not in accepted or is_found.title != named(found).title:
        is_accepted = named(accepted[0]).title
        elsewhere = is_found.advice
        below = [s for s in locate.saves(path) if s.format in accepted] if is_folder(path) else []
        if found not in accepted and {*accepted} & claims.keys():
            elsewhere += " It also holds an exported model: name the file of that to convert it."
        newest = max(below, key=lambda save: save.age, default=None)
        raise UnsupportedError(
            f"it is {is_found.title}, not {is_accepted}.",
            path=path,
            hint=elsewhere if newest is None else f"Below it there is one: {newest.path}.",
        )
