"""A tensor's digest is a tree of leaves, whoever makes it, in whatever pieces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import xxhash
from safetensors.numpy import load_file, save_file

import reshard
from reshard.containers.dcp import layout
from reshard.core import digests
from reshard.core.dtypes import parse
from reshard.core.plan import Slot
from reshard.core.tensors import Entry, Extent, FileRef, Fragment, TensorSpec, whole
from reshard.transfer import making, readback, reading
from reshard.transfer.commit import OutputFolder
from reshard.transfer.pieces import runs

LEAF = 1024
SHAPES = [(), (0, 3), (1,), (256,), (257,), (3, 5, 7), (40, 33), (7, 200), (1, 2, 600), (512, 1)]


def expected(array: Any) -> str:
    """The digest of an array whose leaves are of LEAF bytes, made from its bytes alone."""
    data = array.tobytes()
    leaves = [data[start : start + LEAF] for start in range(0, len(data), LEAF)]
    if len(leaves) == 1:
        return xxhash.xxh3_128_hexdigest(leaves[0])
    return xxhash.xxh3_128_hexdigest(b"".join(map(xxhash.xxh3_128_digest, leaves)))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves and blocks of a few rows."""
    monkeypatch.setattr(digests, "LEAF_NBYTES", LEAF)
    monkeypatch.setattr(making, "_BLOCK", 320)
    monkeypatch.setattr(making, "_STRIDED_BLOCK", 1280)
    monkeypatch.setattr(layout, "MAX_CHUNK_NBYTES", 700)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    random = np.random.default_rng(7)
    tensors = {
        f"{kind}{number}": random.normal(size=shape).astype(kind)
        for number, shape in enumerate(SHAPES)
        for kind in ("float32", "float64", "float16")
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


def stated(folder: Path) -> dict[str, str]:
    content = json.loads((folder / "reshard.json").read_text(encoding="utf-8"))
    assert content["version"] == 2
    return {name: tensor["xxh3_128"] for name, tensor in content["tensors"].items()}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("to", ["hf", "dcp"])
def test_of_every_tensor(
    small: None, model: Path, tmp_path: Path, to: Literal["hf", "dcp"], threads: int
) -> None:
    reshard.convert(model, tmp_path / "out", to=to, max_shard_size=9000, threads=threads)
    arrays = load_file(model / "model.safetensors")
    assert stated(tmp_path / "out") == {name: expected(array) for name, array in arrays.items()}
    assert reshard.verify(tmp_path / "out").num_tensors == len(arrays)
    assert reshard.diff(model, tmp_path / "out").same


def test_of_tensors_in_another_order(small: None, tmp_path: Path) -> None:
    tensors = {"t": torch.randn(50, 40).t(), "p": torch.randn(9, 20, 11).permute(2, 0, 1)}
    (tmp_path / "model").mkdir()
    torch.save(tensors, tmp_path / "model" / "pytorch_model.bin")
    reshard.convert(tmp_path / "model", tmp_path / "out")
    assert stated(tmp_path / "out") == {
        name: expected(tensor.contiguous().numpy()) for name, tensor in tensors.items()
    }
    assert reshard.verify(tmp_path / "out").num_tensors == 2


@pytest.mark.parametrize("to", ["hf", "dcp"])
def test_the_bytes_do_not_depend_on_the_leaves(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: Literal["hf", "dcp"]
) -> None:
    reshard.convert(model, tmp_path / "large", to=to)
    monkeypatch.setattr(digests, "LEAF_NBYTES", LEAF)
    reshard.convert(model, tmp_path / "small", to=to)
    for path in (tmp_path / "large").iterdir():
        if path.name != "reshard.json":
            assert (tmp_path / "small" / path.name).read_bytes() == path.read_bytes()


def test_a_byte_that_differs_is_found(small: None, model: Path, tmp_path: Path) -> None:
    reshard.convert(model, tmp_path / "out")
    weights = tmp_path / "out" / "model.safetensors"
    data = weights.read_bytes()
    for at in range(len(data) - 9000, len(data), 997):
        weights.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        with pytest.raises(
            reshard.VerificationError, match="it has changed since it was written: its digest is"
        ):
            reshard.verify(tmp_path / "out")


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("to", ["hf", "dcp"])
@pytest.mark.parametrize("damaged", [False, True])
def test_files_are_read_again_while_others_are_written(
    small: None,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    to: Literal["hf", "dcp"],
    threads: int,
    damaged: bool,
) -> None:
    """A byte that the disk changed is found, and what was read well is not read twice."""
    monkeypatch.setattr(readback, "LEAST_NBYTES", 300)
    put, count = OutputFolder.put, 0

    def damage(
        folder: OutputFolder, name: str, fd: int, data: memoryview, offset: int, **more: bool
    ) -> None:
        nonlocal count
        count += len(data) == 320
        if damaged and len(data) == 320 and count == 9:
            data = memoryview(bytes([data[0] ^ 1]) + bytes(data[1:]))
        put(folder, name, fd, data, offset, **more)

    monkeypatch.setattr(OutputFolder, "put", damage)
    hashed: list[str] = []
    stream = reading._stream

    def counted(entry: Entry, *arguments: Any, **options: Any) -> Any:
        hashed.append(entry.spec.name)
        return stream(entry, *arguments, **options)

    monkeypatch.setattr(reading, "_stream", counted)
    options: dict[str, Any] = {"to": to, "max_shard_size": 9000, "threads": threads}
    if damaged:
        with pytest.raises(
            reshard.VerificationError, match="it has changed since it was written: its digest is"
        ):
            reshard.convert(model, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
        return
    reshard.convert(model, tmp_path / "out", **options)
    arrays = load_file(model / "model.safetensors")
    again = {name for name, array in arrays.items() if 300 <= array.nbytes <= 700}
    assert again
    assert not again & set(hashed)
    monkeypatch.setattr(OutputFolder, "put", put)
    assert reshard.verify(tmp_path / "out").num_tensors == len(arrays)
    assert again <= set(hashed)


def test_a_later_version_is_refused(model: Path, tmp_path: Path) -> None:
    reshard.convert(model, tmp_path / "out")
    path = tmp_path / "out" / "reshard.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"version": 2', '"version": 3'))
    with pytest.raises(reshard.UnsupportedError, match=r"version 3; this reshard knows .* to 2"):
        reshard.verify(tmp_path / "out")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("before", [0, 100, 256, 1000])
@pytest.mark.parametrize("max_numel", [1, 64, 10_000])
def test_runs_are_in_order_and_stay_in_their_leaf(
    small: None, shape: tuple[int, ...], before: int, max_numel: int
) -> None:
    float32 = parse("float32")
    spec = TensorSpec("x", float32, shape)
    extent = Extent(FileRef("/x"), 0, spec.nbytes)
    source = Entry(spec, (Fragment(whole(shape), extent, float32),))
    at = 0
    for leaf, run in runs(Slot(0, spec, source), before, max_numel):
        assert (run.start, run.skip, run.numel) == (at, 0, run.box.numel)
        first, last = before + run.start, before + run.start + run.numel - 1
        assert first // (LEAF // 4) == last // (LEAF // 4) == leaf
        at += run.numel
    assert at == spec.numel
