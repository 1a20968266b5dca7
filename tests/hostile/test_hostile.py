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


class Trials:
    """Puts forms in the place of a file, or where one would be, and runs commands on them."""

    def __init__(self, bench: Bench, folder: Path) -> None:
        self.bench = bench
        # Each form is made once: some have 250 MB.
        self._folder = folder

    def run(self, place: Place, name: str, form: str, commands: list[tuple[str, ...]]) -> list[str]:
        """What commands did, with a form as the file `name`, beyond the budget or without words."""
        path = place.root / name
        aside = path.with_name(".aside")
        if os.path.lexists(path):
            path.rename(aside)
        self._put(form, path)
        failures = []
        for command in commands:
            try:
                self.bench.run(*command).check()
            except AssertionError as error:
                failures.append(f"{form} as {name}: {command[0]}: {error}")
            shutil.rmtree(place.root / "new", ignore_errors=True)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
        if os.path.lexists(aside):
            aside.rename(path)
        return failures

    def _put(self, form: str, path: Path) -> None:
        if form in SPECIAL:
            FORMS[form](path)
            return
        kept = self._folder / form
        if not kept.exists():
            FORMS[form](kept)
        os.link(kept, path)


@pytest.fixture(scope="module")
def trials(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trials]:
    folder = tmp_path_factory.mktemp("forms")
    yield Trials(bench, folder)
    shutil.rmtree(folder)


@pytest.mark.heavy
@pytest.mark.parametrize(("where", "name", "forms"), _SHORT)
def test_what_no_reader_expects(
    where: str, name: str, forms: tuple[str, ...], root: Path, trials: Trials
) -> None:
    place = PLACES[where](root)
    if "/" not in name:
        (path,) = (path for path in place.source.rglob(name))
        name = path.relative_to(root).as_posix()
    commands = list(place.commands())
    failures = []
    for number, form in enumerate(forms):
        failures += trials.run(place, name, form, [commands[0], commands[1 + number % 5]])
    assert not failures, "\n".join(failures)


@pytest.mark.slow
@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("forms", [SPECIAL, TEXTS, BINARIES], ids=["special", "texts", "binaries"])
def test_anything_in_the_place_of_any_file(
    where: str, forms: dict[str, object], root: Path, trials: Trials
) -> None:
    """Every name that a command asks for, there or not: one of each pattern of names."""
    place = made(where, root, trials.bench)
    failures = []
    seen: set[str] = set()
    for name, every in asked(place, trials.bench).items():
        pattern = re.sub(r"\d+", "0", Path(name).name)
        path = place.root / name
        if pattern in seen or not path.parent.is_dir() or path.is_dir():
            continue
        seen.add(pattern)
        commands = list({command[0]: command for command in reversed(every)}.values())
        for number, form in enumerate(forms):
            failures += trials.run(place, name, form, [commands[number % len(commands)]])
    assert not failures, "\n".join(failures)
