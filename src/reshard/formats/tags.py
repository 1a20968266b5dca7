"""The save that a tag selects: by its name, by its number, or the latest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from reshard.core.regex import regex

#: The tag that means the newest save, where none is called so.
LATEST = "latest"
# The number in a save's name: the last one.
_NUMBER = regex(r"(\d+)(?!.*\d)")
# Names that a message lists.
_LISTED = 10


def number_of(name: str) -> int:
    """The number in a save's name, -1 where there is none: global_step6, checkpoint-500."""
    found = _NUMBER.search(name)
    return int(found[1]) if found else -1


def meant(tag: str, names: Iterable[str]) -> str | None:
    """The name that a tag selects: itself, or the only one with that number.

    >>> meant("10", ["global_step5", "global_step10"])
    'global_step10'
    """
    there = list(names)
    if tag in there:
        return tag
    numbered = [name for name in there if tag.isdecimal() and number_of(name) == int(tag)]
    return numbered[0] if len(numbered) == 1 else None


def listed(names: Sequence[str]) -> str:
    """Names in the order of their numbers, in words; of very many, the newest."""
    ordered = sorted(names, key=lambda name: (number_of(name), name))
    more = f"{len(ordered) - _LISTED} more, " if len(ordered) > _LISTED else ""
    return more + ", ".join(ordered[-_LISTED:]) or "none"


def near(tag: str, names: Iterable[str]) -> str:
    """A question for the nearest names; empty where none is near."""
    found = get_close_matches(tag, names, 3, 0.6)
    return f"Did you mean {' or '.join(found)}?" if found else ""
