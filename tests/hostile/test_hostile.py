"""Every command, given anything at all, ends within five seconds and 256 MiB, in words."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.budget import needs_proc
from tests.hostile.bench import Bench
from tests.hostile.forms import BINARIES, FORMS, SPECIAL, TEXTS
from tests.hostile.pickled_inputs import ALL as INPUTS
from tests.hostile.places import PLACES, Place, asked, made

pytestmark = needs_proc

# Of these the making takes a second or more.
_LARGE = ("very many", "twenty", "chunks", "path", "blob", "archive", "a wide base", "names that",
          "config with many", "snapshots", "saves")  # fmt: skip
# A file of each kind that a reader has, and what is put in its place, in the short suite.
_SHORT = (
    ("dcp", "run/.metadata", ("a pipe", "20 GB of zeros", "a device", "120 MB of text",
                              "the bare bomb of all pairs of names")),
    ("zero2", "run/latest", ("a pipe", "20 GB of zeros", "a loop of links", "a folder")),
    ("zero2", "run/global_step2/mp_rank_00_model_states.pt",
     ("a zip of 4 GB", "a zip with a pickle of 4 GB", "lists that double", "a socket")),
    ("verl", "run/latest_checkpointed_iteration.txt", ("20 GB of zeros", "a pipe")),
    ("verl", "run/global_step_7/actor/fsdp_config.json", ("deep objects", "20 GB after a brace")),
    ("megatron", "run/iter_0000010/metadata.json", ("20 GB after a brace", "deep lists")),
    ("megatron", "run/iter_0000010/common.pt", ("a zip that is deflated", "a pipe")),
    ("cached", "models--a--b/refs/main", ("20 GB of zeros", "4 TB of zeros", "a pipe")),
    ("model", "base/config.json", ("a number of a million digits", "20 GB after a brace")),
    ("model", "run/model.safetensors", ("4 TB of zeros", "a header that states 2^63 bytes")),
    ("adapter", "run/adapter_config.json", ("15 MB of objects", "a pipe")),
    ("lightrft", "client_state.pt", ("a zip with a pickle of 4 GB", "a pipe")),
    ("accelerate", "scheduler.pt", ("lists that double", "20 GB of zeros")),
)  # fmt: skip


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with Bench() as opened:
        yield opened


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """A folder that is gone after the test: some hold 60,000 files."""
    folder = tmp_path / "root"
    folder.mkdir()
    yield folder
    # Others take a level of recursion for each level of folders.
    subprocess.run(["rm", "-rf", str(folder)], check=True)


def _is_large(name: str) -> bool:
    return any(word in name for word in _LARGE)


@pytest.mark.heavy
@pytest.mark.parametrize("name", [name for name in INPUTS if not _is_large(name)])
def test_an_odd_input(name: str, root: Path, bench: Bench) -> None:
    bench.run(*INPUTS[name](root)).check()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in INPUTS if _is_large(name)])
def test_a_large_input(name: str, root: Path, bench: Bench) -> None:
    bench.run(*INPUTS[name](root)).check()


class _Exchanged:
    """A file, or the place where one would be, with forms put there one after the other."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._aside = path.with_name(".aside")

    def put(self, form: str) -> None:
        if os.path.lexists(self._path):
            self._path.rename(self._aside)
        FORMS[form](self._path)

    def restore(self) -> None:
        if self._path.is_dir() and not self._path.is_symlink():
            shutil.rmtree(self._path)
        else:
            self._path.unlink()
        if os.path.lexists(self._aside):
            self._aside.rename(self._path)


def _try(place: Place, name: str, form: str, commands: list[tuple[str, ...]], bench: Bench) -> None:
    """Each command, with the form in a file's place, does what it does within the budget."""
    exchanged = _Exchanged(place.root / name)
    exchanged.put(form)
    try:
        for command in commands:
            try:
                bench.run(*command).check()
            except AssertionError as error:
                raise AssertionError(f"{form} as {name}: {command[0]}: {error}") from None
            shutil.rmtree(place.root / "new", ignore_errors=True)
    finally:
        exchanged.restore()


@pytest.mark.heavy
@pytest.mark.parametrize(("where", "name", "forms"), _SHORT)
def test_what_no_reader_expects(
    where: str, name: str, forms: tuple[str, ...], root: Path, bench: Bench
) -> None:
    place = PLACES[where](root)
    if "/" not in name:
        (path,) = (path for path in place.source.rglob(name))
        name = path.relative_to(root).as_posix()
    commands = list(place.commands())
    for number, form in enumerate(forms):
        _try(place, name, form, [commands[0], commands[1 + number % 5]], bench)


@pytest.mark.slow
@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("forms", [SPECIAL, TEXTS, BINARIES], ids=["special", "texts", "binaries"])
def test_anything_in_the_place_of_any_file(
    where: str, forms: dict[str, object], root: Path, bench: Bench
) -> None:
    """Every name that a command asks for, there or not: one of each pattern of names."""
    place = made(where, root, bench)
    seen: set[str] = set()
    for name, every in asked(place, bench).items():
        pattern = re.sub(r"\d+", "0", Path(name).name)
        path = place.root / name
        if pattern in seen or not path.parent.is_dir() or path.is_dir():
            continue
        seen.add(pattern)
        commands = list({command[0]: command for command in reversed(every)}.values())
        for number, form in enumerate(forms):
            _try(place, name, form, [commands[number % len(commands)]], bench)
