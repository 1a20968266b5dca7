"""Input files: how many are open, and what may stand where a file belongs."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import reshard
from reshard.errors import IncompleteError
from reshard.storage import source
from reshard.storage.local import Sources

SRC = Path(__file__).parents[1] / "src"
LIMIT = 64
DESCRIPTORS = Path("/proc/self/fd")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A model of a hundred shards."""
    folder = tmp_path / "model"
    folder.mkdir()
    names = {f"w{i}": f"model-{i + 1:05d}-of-00100.safetensors" for i in range(100)}
    for name, file in names.items():
        save_file({name: np.ones(2, np.float32)}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


@pytest.mark.heavy
@pytest.mark.parametrize("command", [["inspect"], ["convert", "out"], ["diff", "model"]], ids=str)
def test_more_files_than_may_be_open(shards: Path, command: list[str]) -> None:
    code = (
        "import resource; from reshard.cli.app import main\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({LIMIT}, {LIMIT})); main()"
    )
    name, *rest = command
    done = subprocess.run(
        [sys.executable, "-c", code, name, "model", *rest],
        cwd=shards.parent,
        env={**os.environ, "PYTHONPATH": str(SRC)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not DESCRIPTORS.exists(), reason="where the system lists descriptors")
def test_as_many_files_as_the_system_will_have_are_kept_open(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    before = len(list(DESCRIPTORS.iterdir()))
    with Sources() as sources:
        for path in sorted(shards.glob("*.safetensors")):
            sources.open(path)
        assert len(list(DESCRIPTORS.iterdir())) == before + 100
    assert len(list(DESCRIPTORS.iterdir())) == before


def test_a_command_asks_for_more_descriptors(shards: Path) -> None:
    """Of the files of 256 ranks, half were opened anew for each read."""
    code = (
        "import resource; from reshard.cli.app import reshard, run\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({LIMIT}, 2 * {LIMIT}))\n"
        "run(reshard, ['inspect', 'model', '--json'])\n"
        f"assert resource.getrlimit(resource.RLIMIT_NOFILE) == (2 * {LIMIT},) * 2"
    )
    environment = {**os.environ, "PYTHONPATH": str(SRC)}
    done = subprocess.run([sys.executable, "-c", code], cwd=shards.parent, env=environment)
    assert done.returncode == 0


@pytest.mark.parametrize(
    "file",
    [
        "../model/model-00001-of-00100.safetensors",
        "/etc/hostname",
        "..",
        "",
        "a\0b",
        "a" * 300,
        "\ud800",
        "link.safetensors",
    ],
    ids=ascii,
)
def test_an_index_that_points_elsewhere(shards: Path, file: str) -> None:
    (shards / "link.safetensors").symlink_to("/etc/hostname")
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w0": file}}))
    with pytest.raises(reshard.FormatError, match=r"plain file name|leaves the folder|surrogates"):
        reshard.open(shards)


def test_a_read_that_the_system_refuses_is_a_stated_error(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with Sources() as sources:
        source = sources.open(shards / "model-00001-of-00100.safetensors")
        monkeypatch.setattr(os, "pread", refused)
        monkeypatch.setattr(os, "preadv", refused)
        with pytest.raises(IncompleteError, match=r"cannot be read: Input/output error"):
            source.read(0, 8)


def test_an_index_that_is_a_link_out_of_the_folder(shards: Path) -> None:
    index = shards / "model.safetensors.index.json"
    index.rename(shards.parent / "index.json")
    index.symlink_to("../index.json")
    with pytest.raises(reshard.FormatError, match="leaves the folder"):
        reshard.open(shards)


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_what_is_no_file_is_not_read(shards: Path, kind: str) -> None:
    """A pipe that is opened for reading, or /dev/zero, would never end."""
    path = shards / "model-00001-of-00100.safetensors"
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(reshard.ReshardError):
        reshard.open(shards)
    (shards / "model.safetensors.index.json").unlink()
    with pytest.raises(reshard.FormatError, match=r"not a regular file|leaves the folder"):
        reshard.open(shards)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("[]", "not an object"),
        ("", "cannot be read"),
        ('{"a": 1, "a": 2}', "occurs twice"),
        ('{"a":' * 100_000, "nested too deeply"),
        ('{"a": "\\ud800"}', "cannot be read"),
        (None, "reads at most 16777216"),
    ],
    ids=["list", "empty", "twice", "deep", "half a pair", "endless"],
)
def test_a_config_that_is_none(shards: Path, config: str | None, words: str) -> None:
    path = shards / "config.json"
    path.write_text("{}" if config is None else config)
    if config is None:
        os.truncate(path, 1 << 40)
    with pytest.raises(reshard.FormatError, match=words):
        reshard.convert(shards, shards.parent / "out", base=shards)
    assert reshard.doctor(shards).errors
    assert not (shards.parent / "out").exists()


def test_an_error_is_no_longer_than_a_screen() -> None:
    error = reshard.FormatError("x" * 10**6, tensor="n" * 10**6, hint="Mend it.")
    assert len(str(error)) < 11_000
    assert str(error).endswith("... Mend it.")


@pytest.mark.parametrize("kept_open", [True, False])
def test_a_file_is_compared_with_bytes(
    tmp_path: Path, kept_open: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "_COMPARED_NBYTES", 100)
    whole = np.random.default_rng(1).bytes(1050)
    (tmp_path / "file").write_bytes(whole)
    with Sources() as sources:
        file = sources.open(tmp_path / "file")
        if not kept_open:
            file.close()
        for start, stop in ((0, 1050), (0, 100), (50, 950), (1049, 1050), (7, 7)):
            assert file.equals(start, whole[start:stop])
        for at in (0, 99, 100, 549, 1049):
            other = bytearray(whole)
            other[at] ^= 1
            assert not file.equals(0, bytes(other))
        with pytest.raises(IncompleteError):
            file.equals(1000, whole[1000:] + b"x")
