"""The golden training states: unpacked once a session, with their truths."""

from __future__ import annotations

import functools
import json
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import Struct

from reshard.core.catalog import Catalog
from reshard.core.state import TrainingState
from reshard.core.tensors import Entry
from reshard.formats import Selection, locate
from reshard.storage.local import Sources
from reshard.transfer.reading import read_array
from tests.golden.table import HERE

ROOT = HERE / "state"
DEEPSPEED = (
    "ds_s0_bf16",
    "ds_s0_bf16_fused",
    "ds_s0_fp32",
    "ds_s1_bf16",
    "ds_s1_bf16_gradacc32",
    "ds_s2_bf16_elastic",
    "ds_s2_fp32",
    "ds_s2_fp32_align",
    "ds_s3_fp32_subgroups",
    "uc_s2_fp32",
    "uc_s3_fp32_subgroups",
)
FSDP = (
    "fsdp1_accelerate_fp32",
    "fsdp2_accelerate_bf16",
    "fsdp2_lightrft_fp32",
    "fsdp2_nested_flat_fp32",
    "fsdp2_nested_fp32",
    "fsdp2_titan_fp32",
    "fsdp2_verl_fp32",
)


class Stored(Struct, frozen=True):
    """A tensor bit for bit: safetensors' code of its dtype, its shape, its bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


class Case(Struct, frozen=True):
    """A golden run: the folder that was saved, and what the running engine held."""

    name: str
    folder: Path
    facts: dict[str, Any]

    def truth(self) -> dict[str, Stored]:
        """`exp_avg.NAME` and the like -> what the running engine held."""
        return truth(self.facts["truth"])

    def moments(self) -> dict[str, Stored]:
        """The truth's moments."""
        return {k: v for k, v in self.truth().items() if k.startswith("exp_avg")}


@functools.cache
def case(name: str) -> Case:
    """A golden run, unpacked into a folder that no test changes."""
    folder = _unpacked() / name
    if not folder.exists():
        with tarfile.open(ROOT / f"{name}.tar.xz") as archive:
            archive.extractall(folder, filter="data")
    return Case(name, folder / "ckpt", json.loads((folder / "truth.json").read_text("utf-8")))


def copied(name: str, folder: Path) -> Path:
    """A copy of a golden run, to be changed."""
    return Path(shutil.copytree(case(name).folder, folder / "run"))


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


@functools.cache
def _unpacked() -> Path:
    _KEPT.append(tempfile.TemporaryDirectory())
    return Path(_KEPT[0].name)


@functools.cache
def truth(file: str) -> dict[str, Stored]:
    """The tensors of a safetensors file, read by its header."""
    data = (ROOT / file).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    found = {}
    for name, value in json.loads(data[8:start]).items():
        if name != "__metadata__":
            first, last = value["data_offsets"]
            shape = tuple(value["shape"])
            found[name] = Stored(value["dtype"], shape, data[start + first : start + last])
    return found


class Opened(Struct, frozen=True):
    """A catalog and its state, while the files are open."""

    catalog: Catalog
    state: TrainingState
    sources: Sources

    def stored(self, entry: Entry) -> Stored:
        """What an entry holds, its checksums compared."""
        array = read_array(entry, self.sources, list(self.state.records))
        return Stored(entry.spec.dtype.safetensors, entry.spec.shape, array.tobytes())

    def array(self, entry: Entry) -> np.ndarray[Any, Any]:
        """An entry's elements."""
        return read_array(entry, self.sources, [])


@contextmanager
def opened(folder: Path, selection: Selection | None = None) -> Iterator[Opened]:
    """The catalog and the training state of what lies at `folder`."""
    with Sources() as sources:
        catalog = locate.read(folder, sources, selection or Selection())
        state = catalog.training_state()
        assert state is not None
        yield Opened(catalog, state, sources)


def plain(value: object) -> object:
    """A value as JSON has it: tuples as lists."""
    return json.loads(json.dumps(value))
