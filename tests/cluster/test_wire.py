"""What is sent to workers means what was meant."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from reshard import errors
from reshard._version import __version__
from reshard.core.arithmetic import LowRank, computed
from reshard.core.dtypes import BFLOAT16, FLOAT32
from reshard.core.plan import Slot
from reshard.core.scaled import Scaled
from reshard.core.tensors import (
    Box,
    Computed,
    Entry,
    Extent,
    FileRef,
    Fragment,
    TensorSpec,
    flat,
    whole,
)
from reshard.storage.stores import ChangedError
from reshard.transfer.cluster import wire, worker
from reshard.transfer.cluster.tasks import _failed
from reshard.transfer.cluster.worker import work
from reshard.transfer.finite import NotFinite
from reshard.transfer.pieces import runs
from reshard.transfer.sending import DiffersError
from tests.tensors import evaluate, stored


def entry(shape: tuple[int, ...]) -> Entry:
    extent = Extent(FileRef("/a", "zstd", 3, 4), 64, whole(shape).numel * 4)
    return Entry(TensorSpec("w", FLOAT32, shape), (Fragment(whole(shape), extent, FLOAT32),))


def entries() -> Iterator[Entry]:
    matrix = entry((6, 4))
    yield matrix
    yield Entry(TensorSpec("empty", FLOAT32, (0, 3)), ())
    (fragment,) = matrix.fragments
    strided = Fragment(fragment.box, fragment.extent, FLOAT32, (1, 6))
    yield Entry(matrix.spec, (strided,))
    parts = (Fragment(flat(24, 0, 20), Extent(FileRef("/b"), 0, 40), BFLOAT16),
             Fragment(flat(24, 20, 4), Extent(FileRef("/c"), 0, 8), BFLOAT16))  # fmt: skip
    yield Entry(matrix.spec, parts)
    for magnitude, by_column in ((None, False), (entry((6,)), False), (entry((4,)), True)):
        low = LowRank(matrix, entry((6, 2)), entry((2, 4)), 0.5, magnitude, by_column)
        yield computed(low, matrix)
        yield computed(Scaled(computed(low, matrix), entry((3, 2)), (2, 2), "float8_e5m2"), matrix)


@pytest.mark.parametrize("number", range(10))
def test_entries_arrive_as_they_were(number: int) -> None:
    sent = list(entries())[number]
    packer = wire.Packer()
    raw = wire.encode(packer.slot(Slot(7, sent.spec, sent, (1, 2), sent), 3, sent))
    unpacker = wire.Unpacker(tuple(packer.files))
    slot = unpacker.slot(msgspec.msgpack.decode(raw, type=wire.WireSlot))
    assert (slot.source, slot.reference) == (sent, sent)
    assert (slot.offset, slot.spec, len(slot.crcs)) == (7, sent.spec, 1)


def test_every_computed_array_has_a_wire_form() -> None:
    sent = {type(f.extent.source) for e in entries() for f in e.fragments
            if not isinstance(f.extent, Extent)}  # fmt: skip
    assert sent == set(Computed.__subclasses__())


@pytest.mark.parametrize("over", [(40, 6), (240,)])
def test_fragments_that_are_not_needed_stay(tmp_path: Path, over: tuple[int, ...]) -> None:
    """Whatever range of a tensor is made, it is made of the same values."""
    values = np.arange(240, dtype=np.float32).reshape(40, 6)
    source = stored(tmp_path, "all", values)
    (fragment,) = source.fragments
    step = 240 // 20 if over == (240,) else 2
    parts = []
    for start in range(0, over[0], step):
        sizes = (step, *over[1:])
        box = Box(over, (start, *(0,) * len(over[1:])), sizes)
        at = start * 4 * (6 if len(over) == 2 else 1)
        extent = Extent(fragment.in_file.file, at, box.numel * 4)
        parts.append(Fragment(box, extent, FLOAT32))
    cut = Entry(source.spec, tuple(parts))
    for start, stop in ((0, 240), (0, 1), (7, 31), (100, 173), (239, 240)):
        narrowed = wire.narrowed(cut, start, stop)
        assert len(narrowed.fragments) <= 2 + (stop - start) // 12
        kept = [f.in_file for f in narrowed.fragments]
        first, last = kept[0].offset // 4, (kept[-1].offset + kept[-1].nbytes) // 4
        assert first <= start
        assert last >= stop
    assert np.array_equal(evaluate(cut, 64, values.dtype, 1 << 10), values)


def test_a_worker_says_all_that_it_found(tmp_path: Path) -> None:
    """NaN, infinity, and what is below zero in a mean of squares, which a conversion refuses."""
    values = np.array([1, -2, np.nan, np.inf], np.float32)
    source = stored(tmp_path, "in", values)
    slot = Slot(0, TensorSpec("exp_avg_sq.w", FLOAT32, (4,)), source)
    out = tmp_path / "out"
    out.write_bytes(bytes(16))
    packer = wire.Packer()
    sent = packer.slot(slot, 0, source)
    run = tuple(wire.packed_run(run) for _, run in runs(slot, 0, 4))
    task = wire.MakeTask(
        wire.Inputs(tuple(packer.files), {}),
        (wire.Output(str(out), out.stat().st_ino, 16, "out"),),
        (sent,),
        (wire.WirePiece(((0, run),)),),
        (),
    )
    answer = wire.decode_answer(work(__version__, wire.encode(task)))
    assert isinstance(answer, wire.MakeAnswer)
    ((made,),) = (piece.segments for piece in answer.pieces)
    assert made.special == NotFinite(nan=1, infinite=1, negative=1)
    assert out.read_bytes() == values.tobytes()


def test_runs_arrive_as_they_were() -> None:
    slot = Slot(0, TensorSpec("w", FLOAT32, (9, 5)), entry((9, 5)))
    for _, run in runs(slot, 0, 7):
        assert wire.unpacked_run(wire.packed_run(run), (9, 5)) == run


def test_errors_come_back_as_they_were(tmp_path: Path) -> None:
    def answer(version: str, task: object) -> wire.Answer:
        return wire.decode_answer(work(version, wire.encode(task)))

    packer = wire.Packer()
    sent = packer.entry(stored(tmp_path, "there", np.zeros(3, np.float32)))
    task = wire.HashTask(wire.Inputs(tuple(packer.files), {}), ((sent, 0),))
    assert isinstance(answer(__version__, task), wire.HashAnswer)
    failed = _failed(answer("0.0", task))
    assert failed.hint == "Install the same version on every node."
    (tmp_path / "there").unlink()
    failed = _failed(answer(__version__, task))
    assert failed.path == str(tmp_path / "there")
    assert "every node has under the same path" in str(failed)
    stored(tmp_path, "there", np.zeros(3, np.float32))
    assert isinstance(answer(__version__, task), wire.HashAnswer)


def test_each_error_arrives_as_one_that_users_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the classes that only reshard's own modules have, too."""
    here = {kind for kind in vars(errors).values() if isinstance(kind, type)}
    for error in (
        errors.WriteError("the disk is full.", path="/a", hint="Free some space."),
        ChangedError("s3://bucket/model"),
        DiffersError("it differs.", path="s3://bucket/out"),
    ):

        def fail(version: str, task: bytes, error: errors.ReshardError = error) -> Any:
            raise error

        monkeypatch.setattr(worker, "_answer", fail)
        arrived = _failed(wire.decode_answer(work(__version__, b"")))
        assert str(arrived) == str(error)
        assert type(arrived) in here
        assert isinstance(error, type(arrived))
