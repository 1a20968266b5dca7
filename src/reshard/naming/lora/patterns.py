"""The regular expressions of `alpha_pattern` and `rank_pattern`, restricted because a file states
them.

PEFT (utils/other.py, get_pattern_key) takes the first key for which `(.*\\.)?(key)$` matches a
module's name. A hostile expression can run for years, so only harmless ones are accepted: letters,
dots, classes, alternatives, and at most two repetitions, of a single character or class.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

from reshard.core.regex import regex
from reshard.errors import UnsupportedError, brief

# One token: an escape, a class, a plain character, a group's bracket, `|`, an anchor, a repetition.
_TOKEN = regex(r"\\[.dwDW\\-]|\[\^?[\w.\-]+\]|[\w\-]|\.|\(\?:|\(|\)|\||\^|\$|[*+?]")
_MAX_LENGTH, _MAX_REPEATS, _MAX_PATTERNS = 500, 2, 10_000
# Tokens after which there is nothing to repeat.
_NO_ATOM = ("", "(", "(?:", "|", "^", "$", ")", "*", "+", "?")
# A name of 300 letters is matched in 0.3 s at worst; modules' names have less than 100.
_MAX_NAME = 300


def check(patterns: Iterable[str], setting: str) -> None:
    """Raises `UnsupportedError` for a pattern with anything else."""
    for count, pattern in enumerate(patterns):
        if count >= _MAX_PATTERNS or not _is_plain(pattern):
            raise UnsupportedError(
                f"the {setting} {brief(pattern)} is too complex: in regular expressions, reshard "
                "supports letters, dots, classes, alternatives and two repetitions.",
                hint="Replace it with the modules' names, one entry each.",
            )


def key_of(patterns: Iterable[str], module: str) -> str | None:
    r"""The first pattern that a module's name matches, as PEFT finds it; None: none does.

    >>> key_of(["k_proj", r"layers\.[01]\..*_proj"], "model.layers.1.self_attn.q_proj")
    'layers\\.[01]\\..*_proj'
    """
    if len(module) > _MAX_NAME:
        raise UnsupportedError("its name is too long for a pattern.", tensor=module)
    for pattern in patterns:
        if _compiled(pattern).match(module):
            return pattern
    return None


@lru_cache(_MAX_PATTERNS)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


def _is_plain(pattern: str) -> bool:
    if len(pattern) > _MAX_LENGTH:
        return False
    repeats = position = 0
    before = ""
    while position < len(pattern):
        found = _TOKEN.match(pattern, position)
        if found is None:
            return False
        token, position = found[0], found.end()
        if token in ("*", "+", "?"):
            # `.*?` is a repetition like `.*`; a group that repeats may take exponential time.
            lazy = token == "?" and before in ("*", "+", ")")
            if before in _NO_ATOM and not lazy:
                return False
            repeats += token in ("*", "+")
        before = token
    return repeats <= _MAX_REPEATS and _compiles(pattern)


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return False
    return True
