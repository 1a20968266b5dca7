"""What is said before any work is done."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import reshard
from reshard.errors import OptionError, UnsupportedError, WriteError
from reshard.transfer.cluster import connection


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    save_file({"w": np.ones(4, np.float32)}, folder / "model.safetensors")
    return folder


def test_without_ray(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UnsupportedError, match=r"pip install '\.\[ray\]'"):
        reshard.convert(source, tmp_path / "out", engine="ray")
    assert reshard.convert(source, tmp_path / "out").verified


def test_an_address_without_the_engine(source: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="leave out --ray-address") as caught:
        reshard.convert(source, tmp_path / "out", ray_address="auto")
    assert caught.value.option == "ray_address"


def test_an_address_of_rays_client(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray")
    with pytest.raises(OptionError, match="--ray-address auto"):
        reshard.convert(source, tmp_path / "out", engine="ray", ray_address="ray://head:10001")
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    with pytest.raises(OptionError, match="--ray-address auto"):
        reshard.convert(source, tmp_path / "out", engine="ray")
    assert not ray.is_initialized()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("address", ["head", "head:", ":6379", "head:99999", "head:x", "a b"])
def test_what_is_no_address(source: Path, tmp_path: Path, address: str) -> None:
    with pytest.raises(OptionError, match="is not HOST:PORT, auto or local") as caught:
        reshard.convert(source, tmp_path / "out", engine="ray", ray_address=address)
    assert "ray status" in str(caught.value)


def test_nobody_answers(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(WriteError, match=rf"{address} cannot be reached: .*refused") as caught:
            reshard.convert(source, tmp_path / "out", engine="ray", ray_address=address)
    assert "Run the command on a node" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("address", [None, "local", "auto"])
def test_a_cluster_that_cannot_be_had(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str | None
) -> None:
    """Ray's own words, in one line, and nothing is left."""
    ray = pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def refuse(**given: Any) -> None:
        raise ConnectionError("nobody\n answers")

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(WriteError, match="nobody answers") as caught:
        reshard.convert(source, tmp_path / "out", engine="ray", ray_address=address)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    if address != "auto":
        assert "Leave out --engine" in str(caught.value)
        assert reshard.convert(source, tmp_path / "out").verified


def test_how_a_cluster_of_our_own_is_started() -> None:
    """It sends nothing home, and shows no pages."""
    given = connection._arguments(None, 3, "/tmp/x")
    assert (given["address"], given["num_cpus"], given["include_dashboard"]) == ("local", 3, False)
    assert connection._arguments("head:6379", 3, "/tmp/x")["address"] == "head:6379"
