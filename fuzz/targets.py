"""What is fuzzed: a parser each, with inputs that it takes as seeds.

A target reads any bytes as a file of its kind. It may raise a `ReshardError`, and nothing else; it
may not take long, nor much memory. Where there is a second reader, what is accepted must be what
that one reads. The files that lie in a checkpoint among others are in `folders`.
"""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from msgspec import Struct

import reshard
from fuzz import folders, oracle
from reshard.containers.dcp import parsing
from reshard.containers.dcp.tables import Tables
from reshard.containers.torch import read, read_pickle
from reshard.conversion import manifest
from reshard.core.locations import MANIFEST
from reshard.errors import ReshardError
from reshard.storage import strict_json
from reshard.storage.local import Sources
from tests.torchfile import runs
from tests.torchfile.handmade import Member, archive, tensor, torch_file
from tests.torchfile.handmade import pickle as pickled
from tests.torchfile.hostile import FILES, GOOD, OLD_GOOD, PICKLES
from tests.torchfile.test_properties import ATOMS

# Larger seeds are bombs, whose mutants only take time.
_MAX_SEED_NBYTES = 8192


class Target(Struct, frozen=True):
    """`read` reads bytes as a file of the kind, in a folder that is the target's own.

    `atoms` are what mutations insert, `mutants` how many the short suite tries.
    """

    read: Callable[[bytes, Path], None]
    seeds: Callable[[], list[bytes]]
    atoms: tuple[bytes, ...]
    mutants: int = 200


def _torch(data: bytes, folder: Path) -> None:
    """A file, a bare pickle, and an archive's pickle."""
    path = folder / "fuzz.pt"
    for content in (data, archive(Member("a/data.pkl", data), Member("a/data/0", bytes(16)))):
        path.write_bytes(content)
        with Sources() as sources, suppress(ReshardError):
            read(sources.open(path))
    _pickle(data)


def _pickle(data: bytes) -> None:
    """What is accepted must be what Python reads, in plain data."""
    try:
        found = read_pickle(data, path="fuzz").value
    except ReshardError:
        return
    try:
        known = oracle.value_of(data)
    except Exception:  # Python refuses more: objects of a call that have no length, or no hash
        return
    oracle.check_same(found, known)


def _torch_seeds() -> list[bytes]:
    corpus = [case.make() for case in FILES + PICKLES]
    seeds = [seed for seed in corpus if 0 < len(seed) <= _MAX_SEED_NBYTES]
    return [*seeds, GOOD, OLD_GOOD, pickled(tensor()), torch_file(b"}")]


def _legacy_seeds() -> list[bytes]:
    old = [case.make() for case in FILES if case.name.startswith("old")]
    return [OLD_GOOD, *(seed for seed in old if len(seed) <= _MAX_SEED_NBYTES)]


def _dcp(data: bytes, folder: Path) -> None:
    """A `.metadata`, by itself and in a folder that has the file it names."""
    with suppress(ReshardError):
        parsing.compared(read_pickle(data, path="fuzz").value, Tables("fuzz"))
    with suppress(ReshardError):
        parsing.unpickled(data, Path("fuzz"))
    (folder / ".metadata").write_bytes(data)
    (folder / "__0_0.distcp").write_bytes(GOOD)
    with suppress(ReshardError):
        reshard.open(folder)


def _dcp_seeds() -> list[bytes]:
    import torch
    from torch.distributed.checkpoint import metadata as torch_metadata
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    properties = torch_metadata.TensorProperties(torch.float32)
    index = torch_metadata.MetadataIndex
    chunk = torch_metadata.ChunkStorageMetadata
    seeds = []
    for shape, cuts in (((4,), [(0, 4)]), ((4, 2), [(0, 2), (2, 2)])):
        rest = [0] * (len(shape) - 1)
        chunks = [
            chunk(torch.Size([start, *rest]), torch.Size([size, *shape[1:]]))
            for start, size in cuts
        ]
        state: dict[str, Any] = {
            "w": torch_metadata.TensorStorageMetadata(properties, torch.Size(shape), chunks),
            "o": torch_metadata.BytesStorageMetadata(),
        }
        places: dict[Any, Any] = {
            index("w", [start, *rest]): _StorageInfo("__0_0.distcp", 0, len(GOOD))
            for start, _ in cuts
        }
        places[index("o")] = _StorageInfo("__0_0.distcp", 0, 9)
        paths = {"w": ("w",), "o": ("o",)}
        for planner in (paths, None):
            found = torch_metadata.Metadata(state, planner, places)
            seeds += [pickle.dumps(found, protocol) for protocol in (2, 4)]
    return seeds


def _dcp_runs(data: bytes, folder: Path) -> None:
    """A `.metadata`, its runs matched in bulk: what is accepted must be what its opcodes say."""
    with runs.as_large():
        runs.same(data)


def _dcp_runs_seeds() -> list[bytes]:
    short, few = runs.save(5), runs.save(2, 6)
    return [pickle.dumps(short), runs.in_batches(runs.save(3, 2)), runs.in_batches(few, 2)]


def _safetensors(data: bytes, folder: Path) -> None:
    """A file, and a header before 64 bytes of tensors."""
    path = folder / "model.safetensors"
    for content in (data, struct.pack("<Q", len(data)) + data + bytes(64)):
        path.write_bytes(content)
        with suppress(ReshardError):
            tensors = reshard.open(path).tensors
            _as_safetensors(content, {name: tensors[name].shape for name in tensors})


def _as_safetensors(content: bytes, found: Mapping[str, tuple[int, ...]]) -> None:
    """What is accepted must be what the safetensors library reads."""
    import safetensors

    known = {name: tuple(info["shape"]) for name, info in safetensors.deserialize(content)}  # type: ignore[no-untyped-call]
    # It counts 4-bit elements where reshard counts pairs of them.
    assert known.keys() == found.keys()
    assert all(len(known[name]) == len(shape) for name, shape in found.items())


def _safetensors_seeds() -> list[bytes]:
    one = {"dtype": "F32", "shape": [4, 2], "data_offsets": [0, 32]}
    two = {"dtype": "BF16", "shape": [16], "data_offsets": [32, 64]}
    headers = [{"a": one, "b": two}, {"__metadata__": {"format": "pt"}, "a": one, "b": two}, {}]
    texts = [json.dumps(header).encode() for header in headers]
    return [*texts, *(struct.pack("<Q", len(text)) + text + bytes(64) for text in texts)]


def _index(data: bytes, folder: Path) -> None:
    """Both kinds of index, beside the files that the seeds name."""
    (content,) = _safetensors_seeds()[3:4]
    for name, index, shard in (
        ("safe", "model.safetensors.index.json", content),
        ("bin", "pytorch_model.bin.index.json", GOOD),
    ):
        place = folder / name
        place.mkdir(exist_ok=True)
        (place / "one").write_bytes(shard)
        (place / index).write_bytes(data)
        with suppress(ReshardError):
            reshard.open(place)


def _index_seeds() -> list[bytes]:
    maps: list[Any] = [{"a": "one", "b": "one"}, {"a": "../one"}, {"a": "two"}, {}, None]
    return [json.dumps({"metadata": {}, "weight_map": found}).encode() for found in maps]


def _json(data: bytes, folder: Path) -> None:
    """What is accepted must be what Python reads, with no key twice."""
    try:
        value = strict_json.parse(data, "fuzz")
    except ReshardError:
        return

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len(dict(items)) == len(items)
        return dict(items)

    known = json.loads(data.decode("utf-8"), object_pairs_hook=pairs)
    assert repr(known) == repr(value) or known == value


def _json_seeds() -> list[bytes]:
    return [
        b'{"a": [1, -2.5e3, true, false, null, "\\u00e9\\ud83d\\ude00"], "b": {"c": {}}}',
        b'[[], {}, "", 0, -0, 1e400, NaN, -Infinity, 123456789012345678901234567890]',
        b'{"a:": ":", "\\"": {"a:": 1}}',
        *_safetensors_seeds()[:3],
        *_index_seeds(),
    ]


def _manifest(data: bytes, folder: Path) -> None:
    (folder / MANIFEST).write_bytes(data)
    with Sources() as sources, suppress(ReshardError):
        manifest.read(folder, sources)


def _manifest_seeds() -> list[bytes]:
    stated = {"dtype": "float32", "shape": [2, 3], "xxh3_128": "ab"}
    value = {"reshard": "0.1.0", "source": {"format": "dcp"}, "options": {}, "names": {},
             "tensors": {"a": stated, "b": stated}}  # fmt: skip
    beside = {**value, "beside": {"x": {"c": stated}}, "files": {"x": {"nbytes": 3}}}
    return [json.dumps(value).encode(), json.dumps(beside).encode()]


_JSON_ATOMS = (
    b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"0", b"-1", b"1e9", b"1" * 30, b"null",
    b'"a":1,', b'"\\u0061":', b"\\ud800", b"\xff", b"\xf0\x9f\x98\x80", b"[" * 200, b" ", b"NaN",
)  # fmt: skip

TARGETS: Mapping[str, Target] = {
    "torch": Target(_torch, _torch_seeds, tuple(ATOMS)),
    "legacy": Target(_torch, _legacy_seeds, tuple(ATOMS)),
    "dcp": Target(_dcp, _dcp_seeds, tuple(ATOMS)),
    "dcp runs": Target(_dcp_runs, _dcp_runs_seeds, tuple(ATOMS)),
    "safetensors": Target(_safetensors, _safetensors_seeds, _JSON_ATOMS),
    "index": Target(_index, _index_seeds, _JSON_ATOMS),
    "json": Target(_json, _json_seeds, _JSON_ATOMS),
    "manifest": Target(_manifest, _manifest_seeds, _JSON_ATOMS),
    **{
        name: Target(
            folders.reader(place),
            folders.seeds(place),
            _JSON_ATOMS if place.file.endswith((".json", ".yaml")) else folders.STATE_ATOMS,
            mutants=15,
        )
        for name, place in folders.PLACES.items()
    },
}
