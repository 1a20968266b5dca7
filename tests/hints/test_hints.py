"""Every hint is followed, and what it promised is seen."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hints.case import CASES, Maker, follow
from tests.hints.table import SCENARIOS

assert SCENARIOS
EVERY = [
    pytest.param(template, maker, id=f"{template[:50]}-{number}")
    for template, makers in CASES.items()
    for number, maker in enumerate(makers)
]


@pytest.mark.parametrize(("template", "maker"), EVERY)
def test_a_hint_that_is_followed_helps(template: str, maker: Maker, tmp_path: Path) -> None:
    follow(maker(tmp_path), template)
