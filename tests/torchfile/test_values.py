"""What torch.save wrote is what reshard reads, in both containers, for every kind of value."""

from __future__ import annotations

import argparse
import collections
import enum
import io
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reshard.containers.torch import Global, Opaque, TensorRef, read_pickle
from reshard.core import dtypes
from reshard.core.dtypes import DType
from reshard.core.tensors import flat, whole
from reshard.errors import IncompleteError, PlanError, UnsupportedError
from tests.torchfile.handmade import pickle
from tests.torchfile.support import OLD, read_bytes, same, saved, value_of

CONTAINERS = pytest.mark.parametrize("old", [False, True], ids=["zip", "old"])
UNTYPED = [dtype for dtype in dtypes.ALL if dtype.storage is None]


class Plan(enum.Enum):
    FAST = 1


class Config:
    def __init__(self) -> None:
        self.rank = 3
        self.weight = torch.ones(2)


class Tagged(dict[str, int]):
    pass


def random(dtype: DType, *shape: int) -> torch.Tensor:
    """A tensor of random bits (bool: of random truth)."""
    generator = torch.Generator().manual_seed(7)
    raw = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), generator=generator)
    if dtype.name == "bool":
        return (raw > 127).reshape(shape)
    return raw.to(torch.uint8).view(getattr(torch, dtype.name)).reshape(shape)


def check(path: Path, value: Any, *, old: bool) -> Any:
    content = saved(value, old=old)
    have = value_of(path, content)
    want = torch.load(io.BytesIO(content), weights_only=False)
    assert same(have, want, content)
    return have


@CONTAINERS
@pytest.mark.parametrize("dtype", [d for d in dtypes.ALL if d.storage], ids=str)
def test_every_dtype(tmp_path: Path, dtype: DType, old: bool) -> None:
    check(tmp_path / "x.pt", {"w": random(dtype, 5, 3)}, old=old)


@pytest.mark.parametrize("dtype", UNTYPED, ids=str)
def test_every_dtype_without_a_storage_class(tmp_path: Path, dtype: DType) -> None:
    check(tmp_path / "x.pt", {"w": random(dtype, 5, 3)}, old=False)


@pytest.mark.parametrize("dtype", UNTYPED, ids=str)
def test_every_dtype_without_a_storage_class_in_the_old_container(
    tmp_path: Path, dtype: DType
) -> None:
    # torch 2.13 writes such a file and cannot load it.
    weights = [random(dtype, 5, 3), random(dtype, 7)]
    content = saved(weights, old=True)
    assert same(value_of(tmp_path / "x.pt", content), weights, content)


@CONTAINERS
def test_views_of_one_storage(tmp_path: Path, old: bool) -> None:
    base = torch.arange(60.0)
    table = base.reshape(10, 6)
    value = {
        "whole": base,
        "slice": base[7:19],
        "rows": table[3:5],
        "column": table[:, 2],
        "every other": base[::2],
        "transposed": table.t(),
        "permuted": base.reshape(3, 4, 5).permute(2, 0, 1),
        "expanded": table[0].expand(4, 6),
        "one": table[4, 4],
        "narrow": table[:, 1:2],
        "none": table[:, :0],
    }
    read = check(tmp_path / "x.pt", value, old=old)
    assert read["slice"].strides is None
    assert read["slice"].extent.nbytes == 12 * 4
    assert read["column"].strides == (6,)
    # From the first element used to the last, not to the end of its row.
    assert read["column"].extent.nbytes == (9 * 6 + 1) * 4
    assert read["transposed"].strides == (1, 6)
    assert read["expanded"].strides == (0, 1)
    assert read["expanded"].extent.nbytes == 6 * 4
    assert read["none"].extent.nbytes == 0
    assert read["whole"].extent.offset + 7 * 4 == read["slice"].extent.offset


@CONTAINERS
def test_empty_and_scalar_tensors(tmp_path: Path, old: bool) -> None:
    value = [torch.tensor(1.5), torch.empty(0), torch.empty(3, 0, 2), torch.ones(1, 1, 1)]
    read = check(tmp_path / "x.pt", value, old=old)
    assert [ref.shape for ref in read] == [(), (0,), (3, 0, 2), (1, 1, 1)]
    assert all(ref.strides is None for ref in read)


@CONTAINERS
def test_tied_weights_have_equal_storage(tmp_path: Path, old: bool) -> None:
    weight, other = torch.ones(4, 4), torch.ones(4, 4)
    read = check(tmp_path / "x.pt", {"a": weight, "b": weight, "c": other}, old=old)
    assert read["a"] == read["b"]
    assert read["a"].storage != read["c"].storage


@CONTAINERS
def test_a_module_and_its_optimizer(tmp_path: Path, old: bool) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    # state_dict() has an attribute `_metadata`, which is pickled with BUILD.
    value = {"module": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 1}
    check(tmp_path / "x.pt", value, old=old)


@CONTAINERS
def test_parameters_and_tensors_with_attributes(tmp_path: Path, old: bool) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    tagged = torch.ones(2)
    tagged.ds_id = "0_25"
    tagged_parameter = torch.nn.Parameter(torch.ones(3))
    tagged_parameter.note = 1
    read = check(tmp_path / "x.pt", [parameter, frozen, tagged, tagged_parameter], old=old)
    assert [ref.requires_grad for ref in read] == [True, False, False, True]


@CONTAINERS
def test_plain_values(tmp_path: Path, old: bool) -> None:
    value = {
        "none": None,
        "truth": [True, False],
        "integers": [0, 255, 256, 65536, -1, 2**31, -(2**31) - 1, 2**63, -(2**63), 2**127],
        "floats": [0.0, -0.0, 1e300, float("inf"), float("nan")],
        "text": ["", "a", "ü", "漢字", "\U0001f600", "x" * 300],
        "bytes": [b"", b"a", bytes(range(256)), b"x" * 300],
        "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
        "dict": {1: "a", None: "b", False: "c", (1, "x"): "d", b"k": "e", 2.5: "f"},
        "dtype": torch.bfloat16,
        "size": torch.Size([2, 3]),
        "ordered": collections.OrderedDict(b=1, a=2),
        "default": collections.defaultdict(list, {"a": [1]}),
        "counter": collections.Counter("aab"),
    }
    check(tmp_path / "x.pt", value, old=old)


@CONTAINERS
def test_values_that_are_read_as_simpler_ones(tmp_path: Path, old: bool) -> None:
    content = saved(
        {
            "set": {1},
            "frozen": frozenset({2}),
            "deque": collections.deque([1, 2], 5),
            "array": bytearray(b"ab"),
            "device": torch.device("cuda", 1),
            "cpu": torch.device("cpu"),
            "layout": torch.strided,
        },
        old=old,
    )
    assert value_of(tmp_path / "x.pt", content) == {
        "set": [1],
        "frozen": [2],
        "deque": [1, 2],
        "array": b"ab",
        "device": "cuda:1",
        "cpu": "cpu",
        "layout": "torch.strided",
    }


@CONTAINERS
def test_user_objects_are_records_and_stop_nothing(tmp_path: Path, old: bool) -> None:
    content = saved(
        {
            "weights": torch.ones(2),
            "args": argparse.Namespace(lr=0.1, nested=[argparse.Namespace(x=1)]),
            "config": Config(),
            "plan": Plan.FAST,
            "scalar": np.float64(1.5),
            "array": np.arange(3),
            "class": Config,
            "path": Path("a/b"),
            "tagged": Tagged(a=1),
        },
        old=old,
    )
    file = read_bytes(tmp_path / "x.pt", content)
    value: Any = file.value
    assert same(value["weights"], torch.ones(2), content)
    args = value["args"]
    assert type(args) is Opaque
    assert args.name == "argparse.Namespace"
    assert value["args"].state["nested"][0].state == {"x": 1}
    assert same(value["config"].state["weight"], torch.ones(2), content)
    assert value["plan"].args == (1,)
    assert value["class"] == Global(f"{__name__}.Config")
    assert value["tagged"].items == [("a", 1)]
    assert value["path"].args == ("a", "b")
    assert {"argparse.Namespace", f"{__name__}.Config", f"{__name__}.Plan"} <= set(file.opaque)
    assert not any(name.startswith("torch") for name in file.opaque)


def test_a_nested_class_under_protocol_2_is_a_longer_name(tmp_path: Path) -> None:
    class Outer:
        class Inner:
            pass

    Outer.__qualname__, Outer.Inner.__qualname__ = "Outer", "Outer.Inner"
    globals()["Outer"] = Outer
    try:
        content = saved([Outer.Inner()])
    finally:
        del globals()["Outer"]
    value = value_of(tmp_path / "x.pt", content)
    assert value[0].name == f"{__name__}.Outer.Inner"


def test_tensors_that_are_not_handled_say_why(tmp_path: Path) -> None:
    content = saved(
        {
            "sparse": torch.eye(3).to_sparse(),
            "meta": torch.empty(3, device="meta"),
            "complex": torch.ones(2, dtype=torch.complex128),
            "quantized": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
            "conjugate": torch.ones(2, dtype=torch.complex64).conj(),
            "negative": torch.ones(2, dtype=torch.complex64).conj().imag,
            "good": torch.ones(2),
        }
    )
    file = read_bytes(tmp_path / "x.pt", content)
    value: Any = file.value
    assert same(value.pop("good"), torch.ones(2), content)
    assert {name: record.describe() for name, record in value.items()} == {
        "sparse": "a sparse tensor",
        "meta": "a meta tensor, which has no data",
        "complex": "a tensor of a torch.ComplexDoubleStorage",
        "quantized": "a quantized tensor",
        "conjugate": "a tensor whose conjugate or negative bit is set",
        "negative": "a tensor whose conjugate or negative bit is set",
    }
    assert "torch.ComplexDoubleStorage" in file.opaque
    assert "torch._utils._rebuild_sparse_tensor" in file.opaque


def test_dtypes_that_are_not_handled_are_names(tmp_path: Path) -> None:
    assert value_of(tmp_path / "x.pt", saved([torch.complex128])) == [Global("torch.complex128")]


def test_a_tensor_of_another_class_keeps_its_parts(tmp_path: Path) -> None:
    class Wrapped(torch.Tensor):  # type: ignore[misc]
        pass

    Wrapped.__qualname__ = "Wrapped"
    globals()["Wrapped"] = Wrapped
    try:
        content = saved([torch.ones(3).as_subclass(Wrapped)])
    finally:
        del globals()["Wrapped"]
    value = value_of(tmp_path / "x.pt", content)
    assert value[0].name == f"{__name__}.Wrapped"
    assert same(value[0].args[0], torch.ones(3), content)


def test_a_tensor_as_a_fragment(tmp_path: Path) -> None:
    content = saved([torch.ones(2, 3), torch.ones(3, 2).t()])
    plain, transposed = value_of(tmp_path / "x.pt", content)
    assert isinstance(plain, TensorRef)
    assert plain.fragment().box == whole((2, 3))
    assert plain.fragment(flat(10, 2, 6)).extent == plain.extent
    assert transposed.fragment().strides == (1, 2)
    with pytest.raises(PlanError, match=r"shape \(2, 3\) cannot fill a box of sizes \(7,\)"):
        plain.fragment(flat(10, 2, 7))
    with pytest.raises(PlanError, match="cannot fill"):
        transposed.fragment(flat(10, 2, 6))


def test_a_whole_pickled_model_is_records(tmp_path: Path) -> None:
    content = saved(torch.nn.Linear(2, 2))
    value = value_of(tmp_path / "x.pt", content)
    assert value.name == "torch.nn.modules.linear.Linear"
    assert value.state["_parameters"]["weight"].shape == (2, 2)


def test_the_old_container_says_that_it_has_no_checksums(tmp_path: Path) -> None:
    stream = io.BytesIO()
    torch.save(torch.ones(2), stream, **OLD)
    file = read_bytes(tmp_path / "x.pt", stream.getvalue())
    assert file.records == ()
    assert "no checksums" in file.warnings[0]


@pytest.mark.parametrize("code", [b"]q\x00h\x00a", b"}q\x00K\1h\x00\x85s"])
def test_a_container_may_hold_itself(code: bytes) -> None:
    """A user's own state may be cyclic; it is passed by, and a reader walks only what it knows."""
    value = read_pickle(pickle(code), path="x").value
    assert isinstance(value, list | dict)
    assert len(value) == 1


@CONTAINERS
def test_text_that_is_no_unicode_is_spelt_out(tmp_path: Path, old: bool) -> None:
    """As Python spells file names that are not UTF-8: they could be neither written nor shown."""
    value = value_of(tmp_path / "x.pt", saved({"caf\udce9": "\ud800", "é": "😀"}, old=old))
    assert value == {"caf\\udce9": "\\ud800", "é": "😀"}


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> int:
    """The length of the longest string that is copied, which is 64 MiB in truth."""
    for module in ("opcodes", "machine"):
        monkeypatch.setattr(f"reshard.containers.torch.{module}.MAX_STRING_NBYTES", 5000)
    return 5000


@pytest.mark.parametrize(
    ("kind", "old", "protocol"),
    [(str, False, 2), (str, True, 2), (bytes, True, 2), (bytes, False, 4)],
)
def test_a_string_of_many_megabytes_is_not_copied(
    tmp_path: Path, kind: type[str | bytes], old: bool, protocol: int, limit: int
) -> None:
    """What it says is of no use to a conversion, and each copy of it takes memory."""
    one = "x" if kind is str else b"x"
    for length, is_read in ((limit, True), (limit + 1, False)):
        raw = saved({"log": one * length, "n": 1}, old=old, protocol=protocol)
        value = value_of(tmp_path / f"{length}.pt", raw)
        assert value["n"] == 1
        assert isinstance(value["log"], kind if is_read else Opaque)


@pytest.mark.parametrize("code", [b"X", b"B"])
def test_a_string_that_is_cut_off(code: bytes, limit: int) -> None:
    with pytest.raises(IncompleteError, match="ends early"):
        read_pickle(code + struct.pack("<I", limit + 1) + b"x.", path="x")


@pytest.mark.parametrize("code", [b"X", b"B"])
def test_a_key_that_is_not_decoded_is_refused(code: bytes, limit: int) -> None:
    """Its value may be a tensor, which whoever looks for names would pass over."""
    key = code + struct.pack("<I", limit + 1) + bytes(limit + 1)
    for data in (b"\x80\x02}" + key + b"K\1s.", b"\x80\x02}(K\1K\2" + key + b"K\1u."):
        with pytest.raises(UnsupportedError, match=f"a key of more than {limit} bytes"):
            read_pickle(data, path="x")
