"""Patterns on dotted tensor names, and rewriting one into another.

`*` stands for one dotted part, `**` for one or more; everything else stands for itself. Two
patterns with the same wildcards in the same order are two spellings of one name, and each can be
rewritten into the other:

    language_model.model.**   <->   model.language_model.**
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache


@lru_cache(maxsize=4096)
def _compile(pattern: str) -> re.Pattern[str]:
    regex = {"*": r"([^.]+)", "**": r"(.+)"}
    return re.compile(r"\.".join(regex.get(part, re.escape(part)) for part in pattern.split(".")))


def match(pattern: str, name: str) -> tuple[str, ...] | None:
    """What the wildcards stand for in `name`; None if the pattern does not match.

    >>> match("model.layers.*.mlp.**", "model.layers.3.mlp.experts.gate_up_proj")
    ('3', 'experts.gate_up_proj')
    """
    found = _compile(pattern).fullmatch(name)
    return None if found is None else found.groups()


def fill(pattern: str, parts: Iterable[str]) -> str:
    """The name that the pattern and its wildcards' values make.

    >>> fill("layers.*.mlp.**", ("3", "gate.weight"))
    'layers.3.mlp.gate.weight'
    """
    values = iter(parts)
    return ".".join(next(values) if set(part) == {"*"} else part for part in pattern.split("."))


def spelt(pattern: str) -> str:
    """The longest part that every name which the pattern matches contains; empty where it may be
    any name.

    >>> spelt("**.mlp.experts.*.up"), spelt("**")
    ('experts', '')
    """
    return max((part for part in pattern.split(".") if "*" not in part), key=len, default="")


@lru_cache(maxsize=256)
def _compile_any(patterns: tuple[str, ...]) -> re.Pattern[str]:
    # One expression: a model of 36,000 tensors is matched with each table a few dozen times.
    return re.compile("|".join(f"(?:{_compile(pattern).pattern})" for pattern in patterns))


def matches_any(patterns: Iterable[str], name: str) -> bool:
    """Whether one of the patterns matches the name."""
    given = tuple(patterns)
    return bool(given) and _compile_any(given).fullmatch(name) is not None


def exactness(given: Iterable[str], name: str) -> int:
    """The most parts that a matching pattern spells out; -1 if no pattern matches.

    >>> exactness(["model.**", "model.language_model.**"], "model.language_model.norm.weight")
    2
    """
    fitting = (pattern for pattern in given if match(pattern, name) is not None)
    counts = (sum("*" not in part for part in pattern.split(".")) for pattern in fitting)
    return max(counts, default=-1)


def rewrite(name: str, rules: Iterable[tuple[str, str]]) -> tuple[str, tuple[str, str] | None]:
    """The name, rewritten by the first rule (from, to) whose `from` matches it; and the rule.

    >>> rewrite("model.visual.proj", [("model.visual.**", "visual.**"), ("model.**", "text.**")])
    ('visual.proj', ('model.visual.**', 'visual.**'))
    """
    for rule in rules:
        parts = match(rule[0], name)
        if parts is not None:
            return fill(rule[1], parts), rule
    return name, None
