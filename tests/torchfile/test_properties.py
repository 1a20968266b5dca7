"""Whatever is saved is read back equal; whatever is damaged is refused or read, never worse."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reshard.containers.torch import read, read_pickle
from reshard.errors import ReshardError
from reshard.storage.local import Sources
from tests.torchfile.handmade import old_file, tensor, torch_file
from tests.torchfile.support import read_bytes, same, saved

SETTINGS = settings(
    deadline=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
INTEGERS = st.integers(-(2**2000), 2**2000) | st.integers(-300, 70_000)
LEAVES = (
    st.none()
    | st.booleans()
    | INTEGERS
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=300)
)
KEYS = st.text(max_size=5) | st.integers(-(2**40), 2**40) | st.booleans() | st.binary(max_size=3)
DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8]


def nested(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=5)
            | st.lists(inner, max_size=5).map(tuple)
            | st.dictionaries(KEYS, inner, max_size=5)
        ),
        max_leaves=20,
    )


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """A view of a small storage: sliced, stepped, transposed, expanded."""
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    dtype = draw(st.sampled_from(DTYPES))
    count = 1
    for size in shape:
        count *= size
    value = torch.arange(count).to(dtype).reshape(shape)
    for dim, size in enumerate(shape):
        start = draw(st.integers(0, size))
        step = draw(st.integers(1, 3))
        value = value.narrow(dim, start, size - start)
        value = value[(slice(None),) * dim + (slice(None, None, step),)]
    value = value.permute(draw(st.permutations(range(value.dim()))))
    if draw(st.booleans()):
        value = value.unsqueeze(0).expand(3, *value.shape)
    return value


@SETTINGS
@given(value=nested(LEAVES | tensors()), old=st.booleans())
def test_torch_save(tmp_path: Path, value: Any, old: bool) -> None:
    content = saved(value, old=old)
    want = torch.load(io.BytesIO(content), weights_only=False)
    assert same(read_bytes(tmp_path / "x.pt", content).value, want, content)


@SETTINGS
@given(value=nested(LEAVES), protocol=st.integers(2, 5))
def test_bare_pickles(value: Any, protocol: int) -> None:
    content = pickle.dumps(value, protocol)
    assert same(read_pickle(content, path="x").value, value, b"")


def real_files() -> list[bytes]:
    base = torch.arange(24.0)
    value = {
        "w": torch.nn.Parameter(base[2:8].reshape(2, 3).t()),
        "h": base[7:9].to(torch.float8_e4m3fn),
        "tagged": base,
        "meta": [1, 2.5, "x", None, (True, b"y"), torch.Size([2]), Path("p"), {3: {4: 5}}],
    }
    return [saved(value), saved(value, old=True), torch_file(tensor()), old_file()]


FILES = real_files()


def survives(path: Path, content: bytes) -> None:
    """Reading gives a value or a `ReshardError`; anything else fails the test."""
    path.write_bytes(content)
    with Sources() as sources:
        try:
            read(sources.open(path))
        except ReshardError:
            return


@pytest.mark.heavy
@settings(SETTINGS, max_examples=600)
@given(
    index=st.integers(0, len(FILES) - 1),
    changes=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4
    ),
)
def test_flipped_bytes(tmp_path: Path, index: int, changes: list[tuple[float, int]]) -> None:
    content = bytearray(FILES[index])
    for where, byte in changes:
        content[int(where * len(content))] = byte
    survives(tmp_path / "x.pt", bytes(content))


@settings(SETTINGS, max_examples=300)
@given(
    index=st.integers(0, 3),
    start=st.floats(0, 1),
    length=st.integers(0, 400),
    filler=st.binary(max_size=40),
)
def test_cut_and_filled_bytes(
    tmp_path: Path, index: int, start: float, length: int, filler: bytes
) -> None:
    content = FILES[index]
    at = int(start * len(content))
    survives(tmp_path / "x.pt", content[:at] + filler + content[at + length :])


# Opcodes with arguments that fit more often than random bytes do.
ATOMS = [
    bytes([code]) for code in b"().NQRabsteu}]\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x93\x94"
] + [
    b"K\1", b"h\0", b"h\1", b"q\0", b"q\1", b"X\1\0\0\0a", b"C\1a", b"\x8a\1\xff", b"cos\nsystem\n",
    b"ctorch\nSize\n", b"ctorch\nFloatStorage\n", b"ctorch\nfloat32\n",
    b"ccollections\nOrderedDict\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_parameter\n",
    b"ctorch._tensor\n_rebuild_from_type_v2\n", b"cbuiltins\ngetattr\n", b"cbuiltins\nset\n",
    b"c_codecs\nencode\n", b"ctorch\ndevice\n", b"ctorch.serialization\n_get_layout\n",
    b"cdeepspeed.runtime.zero.config\nZeroStageEnum\n", b"X\7\0\0\0storage",
]  # fmt: skip


@pytest.mark.heavy
@settings(SETTINGS, max_examples=600)
@given(atoms=st.lists(st.sampled_from(ATOMS), max_size=30), zipped=st.booleans())
def test_random_programs(tmp_path: Path, atoms: list[bytes], zipped: bool) -> None:
    body = b"".join(atoms)
    if zipped:
        survives(tmp_path / "x.pt", torch_file(body))
        return
    try:
        read_pickle(b"\x80\x04" + body + b".", path="x")
    except ReshardError:
        return


@pytest.mark.parametrize("index", range(len(FILES)))
def test_every_cut(tmp_path: Path, index: int) -> None:
    """A file that ends anywhere too early is refused."""
    content = FILES[index]
    for end in range(0, len(content), 7):
        with pytest.raises(ReshardError):
            read_bytes(tmp_path / "x.pt", content[:end])
