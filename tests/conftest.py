"""Fixtures for all tests."""

from __future__ import annotations

import pytest

from tests.oracle.cache import Oracle, open_or_make


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have one worker make DeepSpeed's checkpoints while the others do what needs none."""
    late = {item.path for item in items if "oracle" in getattr(item, "fixturenames", ())}
    items.sort(key=lambda item: (item.path.name != "test_oracle.py", item.path in late))


@pytest.fixture(scope="session")
def oracle(pytestconfig: pytest.Config) -> Oracle:
    """Checkpoints that the real DeepSpeed wrote, each with its truth, by name.

    The first use makes them all, in a minute or two; later runs find them in pytest's cache. Where
    DeepSpeed or PEFT is not installed, what needs them is skipped; `tests/golden` holds small ones.
    """
    for package in ("deepspeed", "peft"):
        pytest.importorskip(package)
    return open_or_make(pytestconfig.cache.mkdir("oracle"))
