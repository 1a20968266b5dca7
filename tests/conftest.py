"""Fixtures for all tests, and the skipping of those whose framework is not installed."""

from __future__ import annotations

import gc
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pytest
from hypothesis import settings

from tests.oracles import MISSING, lacking

if TYPE_CHECKING:  # it imports torch
    from tests.oracle.cache import Oracle

# hypothesis fails an example that takes more than 0.2 s by default; on a busy machine some do.
settings.register_profile("without a deadline", deadline=None)
settings.load_profile("without a deadline")


_HERE = Path(__file__).parent
# The first tests of each, which make what many others read and wait for.
_MAKING = (_HERE / "test_oracle.py", _HERE / "fsdp" / "test_read.py")


def pytest_configure(config: pytest.Config) -> None:
    """Leave out what takes long where no folder is named: `pytest` is a newcomer's first command.

    `pytest tests`, as of `make test`, runs everything.
    """
    if hasattr(config, "workerinput") or config.getoption("dist", "no") == "no":
        gc.disable()  # until all is imported: half of the time of it
    alone = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    if alone and config.option.markexpr == "not slow":
        config.option.markexpr = "not slow and not heavy"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have one worker make DeepSpeed's checkpoints, and the next FSDP's, while the others do what
    needs none."""
    late = {item.path for item in items if "oracle" in getattr(item, "fixturenames", ())}
    first = {path: at for at, path in enumerate(_MAKING)}
    items.sort(key=lambda item: (first.get(item.path, len(first)), item.path in late))


def pytest_collection_finish() -> None:
    """Have the garbage collector pass over what was imported, in every test."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def oracle(pytestconfig: pytest.Config) -> Oracle:
    """Checkpoints that the real DeepSpeed wrote, each with its truth, by name.

    The first use makes them all, in a minute or two; later runs find them in pytest's cache. Where
    DeepSpeed or PEFT is not installed, what needs them is skipped; `tests/golden` holds small ones.
    """
    for package in ("deepspeed", "peft"):
        pytest.importorskip(package)
    from tests.oracle.cache import open_or_make

    return open_or_make(pytestconfig.cache.mkdir("oracle"))


class _Skipped(pytest.Collector):
    """A file, or a folder with its fixtures, that needs a framework which is not installed."""

    reason: str

    def collect(self) -> NoReturn:
        pytest.skip(self.reason, allow_module_level=True)


def _skipped(path: Path, needs: Path, parent: pytest.Collector) -> pytest.Collector | None:
    missing = lacking(needs) if MISSING and needs.is_file() else None
    if missing is None:
        return None
    made = _Skipped.from_parent(parent, name=path.name)
    made.reason = f"{missing} is not installed"
    return made


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makemodule(
    module_path: Path, parent: pytest.Collector
) -> pytest.Collector | None:
    return _skipped(module_path, module_path, parent)


@pytest.hookimpl(tryfirst=True)
def pytest_collect_directory(path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    return _skipped(path, path / "conftest.py", parent)


@contextmanager
def _skipping() -> Iterator[None]:
    """Skip what imports a package that is not installed when it runs."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in MISSING:
            raise
        pytest.skip(f"{missing} is not installed")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Generator[None, object, object]:
    with _skipping():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    with _skipping():
        return (yield)
