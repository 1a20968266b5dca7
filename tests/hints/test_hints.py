"""Every hint is followed, and what it promised is seen."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hints.case import CASES, Maker, follow
from tests.hints.table import TABLE

assert TABLE


@pytest.mark.parametrize(
    ("template", "maker"),
    [pytest.param(t, maker, id=f"{t[:60]}-{i}") for t, ms in CASES.items() for i, maker in enumerate(ms)],
)
def test_a_hint_that_is_followed_helps(template: str, maker: Maker, tmp_path: Path) -> None:
    follow(maker(tmp_path), template)
