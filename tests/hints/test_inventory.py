"""Every hint in the sources stands in the table, and every line of the table is of a hint."""

from __future__ import annotations

import re
from pathlib import Path

from tests.hints.case import CASES
from tests.hints.collect import hints
from tests.hints.table import ELSEWHERE, WITHOUT

TESTS = Path(__file__).parents[1]


def test_every_hint_is_followed_or_says_why_not() -> None:
    lacking = {
        hint: sorted(where)
        for hint, where in hints().items()
        if not {hint} & {*CASES, *ELSEWHERE, *WITHOUT}
    }
    assert not lacking


def test_every_line_is_of_a_hint() -> None:
    stale = {*CASES, *ELSEWHERE, *WITHOUT} - hints().keys()
    assert not stale


def test_a_hint_that_is_followed_needs_no_reason() -> None:
    assert not CASES.keys() & {*ELSEWHERE, *WITHOUT}
    assert not ELSEWHERE.keys() & WITHOUT.keys()


def test_the_tests_that_are_named_are_there() -> None:
    for place in ELSEWHERE.values():
        file, name = place.split("::")
        text = (TESTS / file).read_text("utf-8")
        assert re.search(rf"^def {name}\(", text, re.MULTILINE), place


def test_most_hints_are_followed_here() -> None:
    """The list of reasons stays short."""
    assert len(WITHOUT) < len(CASES) / 10
