"""Huge and odd pickles, metadata and archives; see `inputs`."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.hostile.inputs import INPUTS, Command, Maker, register
from tests.test_tiling import grid, pinwheels, spiral
from tests.torchfile.handmade import Member, archive, numbers, storage, tensor, text, torch_file
from tests.torchfile.handmade import pickle as pickled

# Pickles whose parts are shared: small files that stand for huge values.


def _recalled(index: int) -> bytes:
    return b"j" + struct.pack("<L", index)


def _stored(index: int) -> bytes:
    return b"r" + struct.pack("<L", index)


def _list(items: bytes) -> bytes:
    return b"](" + items + b"e"


def _dict(**items: bytes) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def _verl(at: Path, body: bytes, world: int = 2) -> Command:
    """A rank's file of verl, twice."""
    (at / "run").mkdir()
    for rank in range(2):
        path = at / "run" / f"model_world_size_{world}_rank_{rank}.pt"
        path.write_bytes(torch_file(body))
    return "inspect", at / "run", "--optimizer"


def _wrapped(cls: str, shape: tuple[int, ...], state: bytes) -> bytes:
    """A tensor of a class of torch.distributed, as _rebuild_from_type_v2 makes it."""
    module, name = cls.rsplit(".", 1)
    rebuilt = f"c{module}\n{name}\n".encode()
    size = b"ctorch\nSize\n" + numbers(shape) + b"\x85R"
    return (
        b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch._utils\n_rebuild_wrapper_subclass\n"
        + rebuilt + b"(" + rebuilt + b"ctorch\nfloat32\n" + size + b"t" + state + b"tR"
    )  # fmt: skip


def _record(name: str, **fields: bytes) -> bytes:
    module, short = name.rsplit(".", 1)
    return f"c{module}\n{short}\n".encode() + b")\x81" + _dict(**fields) + b"b"


def _cut(offset: int, size: int) -> bytes:
    return _record(
        "torch.distributed._shard.metadata.ShardMetadata",
        shard_offsets=numbers((offset,)),
        shard_sizes=numbers((size,)),
    )


def _sharded(listed: bytes, shards: bytes, count: int) -> bytes:
    metadata = _record(
        "torch.distributed._shard.sharded_tensor.metadata.ShardedTensorMetadata",
        shards_metadata=listed,
        size=b"ctorch\nSize\n" + numbers((count,)) + b"\x85R",
    )
    group = _dict(global_rank=b"K\0", global_world_size=b"K\2")
    group = b"ctorch.distributed._shard\nProcessGroupState\n)\x81" + group + b"b"
    state = b"(" + shards + metadata + group + b"t"
    return _wrapped("torch.distributed._shard.sharded_tensor.api.ShardedTensor", (count,), state)


@register
def a_sharded_tensor_of_many_shards(at: Path) -> Command:
    """Each of 15,000 shards is looked for among as many."""
    count = 15_000
    listed = _list(b"".join(_cut(n, 1) for n in range(count)))
    one = tensor(size=(1,))
    shards = _list(
        b"".join(
            _record(
                "torch.distributed._shard.sharded_tensor.shard.Shard",
                tensor=one,
                metadata=_cut(count - 1 - n, 1),
            )
            for n in range(count)
        )
    )
    return _verl(at, b"}" + text("w") + _sharded(listed, shards, count) + b"s")


@register
def many_sharded_tensors_of_the_same_shards(at: Path) -> Command:
    """The list of 20,000 shards is written once, and recalled 2,000 times."""
    count = 20_000
    listed = _list(b"".join(_cut(n, 1) for n in range(count))) + _stored(0)
    body = b"}(" + text("w") + _sharded(listed, b"]", count)
    body += b"".join(text(f"w{n}") + _sharded(_recalled(0), b"]", count) for n in range(2000))
    return _verl(at, body + b"u")


def _mesh(ranks: bytes, count: int) -> bytes:
    layout = _record("torch.distributed._mesh_layout._MeshLayout",
                     shape=number_of(count), stride=b"K\1")  # fmt: skip
    return _record("torch.distributed.device_mesh.DeviceMesh",
                   _flatten_rank_map=ranks, _layout=layout)  # fmt: skip


def number_of(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def _dtensor(mesh: bytes, count: int) -> bytes:
    replicate = _record("torch.distributed.tensor.placement_types.Replicate", x=b"N")
    spec = _record(
        "torch.distributed.tensor._dtensor_spec.DTensorSpec",
        mesh=mesh,
        placements=replicate + b"\x85",
    )
    state = b"N" + _dict(_local_tensor=tensor(), _spec=spec) + b"\x86"
    return _wrapped("torch.distributed.tensor.DTensor", (4,), state)


@register
def many_meshes_of_the_same_ranks(at: Path) -> Command:
    """200,000 ranks, written once, in 500 meshes."""
    count = 200_000
    ranks = b"(" + b"".join(map(number_of, range(count))) + b"t" + _stored(0)
    body = b"}(" + text("w") + _dtensor(_mesh(ranks, count), count)
    body += b"".join(
        text(f"w{n}") + _dtensor(_mesh(_recalled(0), count), count) for n in range(500)
    )
    return _verl(at, body + b"u", count)


@register
def optimizer_groups_of_the_same_parameters(at: Path) -> Command:
    """A list of 200,000 numbers, in 2,000 groups."""
    command = _verl(at, b"}" + text("w") + tensor() + b"s")
    params = _list(b"".join(map(number_of, range(200_000)))) + _stored(0)
    groups = _list(_dict(params=params) + _dict(params=_recalled(0), lr=b"K\1") * 2000)
    for rank in range(2):
        path = at / "run" / f"optim_world_size_2_rank_{rank}.pt"
        path.write_bytes(torch_file(_dict(state=b"}", param_groups=groups)))
    return command


@register
def flat_tensors_of_many_modules(at: Path) -> Command:
    """FSDP1's, of 1,000 lengths, to be found among 2,000 modules."""
    (at / "run").mkdir()
    held = Member("archive/data/0", bytes(4 * 1000))
    moments = b"".join(
        number_of(n) + _dict(exp_avg=tensor(size=(1 + n,), numel=1000), step=b"K\1")
        for n in range(1000)
    )
    params = _list(b"".join(map(number_of, range(1000))))
    state = _dict(state=b"}(" + moments + b"u", param_groups=_list(_dict(params=params)))
    for rank in range(2):
        model = b""
        for n in range(4000):
            rows = 1 + (n // 2) % 977
            shard = _record(
                "torch.distributed._shard.sharded_tensor.shard.Shard",
                tensor=tensor(size=(rows,), numel=1000),
                metadata=_cut(rows * rank, rows),
            )
            cuts = _list(_cut(0, rows) + _cut(rows, rows))
            whole = _sharded(cuts, _list(shard), 2 * rows)
            mine = whole.replace(text("global_rank") + b"K\0", text("global_rank") + b"K%c" % rank)
            model += text(f"l{n // 2}.{'ab'[n % 2]}") + mine
        for name, body in (("model", b"}(" + model + b"u"), ("optim", state)):
            path = at / "run" / f"{name}_world_size_2_rank_{rank}.pt"
            path.write_bytes(torch_file(body, held))
    return "inspect", at / "run", "--optimizer"


@register
def optimizer_states_of_the_same_settings(at: Path) -> Command:
    """A dict of 50,000 numbers, in 10,000 groups."""
    command = _verl(at, b"}" + text("w") + tensor() + b"s")
    held = b"}(" + b"".join(text(f"k{n}") + b"K\1" for n in range(50_000)) + b"u" + _stored(0)
    groups = _list(_dict(params=b"]", x=held) + _dict(params=b"]", x=_recalled(0)) * 10_000)
    state = b"}(K\0" + _recalled(0) + b"".join(number_of(n) + _recalled(0) for n in range(1, 9_000))
    for rank in range(2):
        path = at / "run" / f"optim_world_size_2_rank_{rank}.pt"
        path.write_bytes(torch_file(_dict(param_groups=groups, state=state + b"u")))
    return command


def _deepspeed(at: Path, **fields: bytes) -> Command:
    (at / "run").mkdir()
    module = b"}" + text("w") + tensor() + b"s"
    content = {"module": module, "ds_version": text("0.19.8"), **fields}
    path = at / "run" / "mp_rank_00_model_states.pt"
    path.write_bytes(torch_file(_dict(**content)))
    return "inspect", at / "run", "--optimizer"


@register
def deepspeed_groups_of_the_same_parameters(at: Path) -> Command:
    shapes = b"}(" + b"".join(text(f"w{n}") + b"K\1\x85" for n in range(50_000)) + b"u" + _stored(0)
    groups = _list(shapes + _recalled(0) * 5_000)
    return _deepspeed(
        at, param_shapes=groups, ds_config=_dict(zero_optimization=_dict(stage=b"K\1"))
    )


@register
def deepspeed_experts_without_number(at: Path) -> Command:
    return _deepspeed(
        at, num_experts=_list(number_of(2**31 - 1) * 20), dp_world_size=number_of(2**30)
    )


@register
def deepspeed_client_state_that_is_shared(at: Path) -> Command:
    held = _list(b"K\1" * 100_000) + _stored(0)
    return _deepspeed(at, lr_scheduler=_dict(a=_list(held + _recalled(0) * 30_000)))


# DCP.


def _dcp(at: Path, metadata: object, **files: bytes) -> Command:
    (at / "run").mkdir()
    (at / "run" / ".metadata").write_bytes(pickle.dumps(metadata, 4))
    for name, content in files.items():
        (at / "run" / name).write_bytes(content)
    return "inspect", at / "run"


def _described(state: Mapping[str, Any], planner: Any, places: Mapping[Any, Any]) -> object:
    from torch.distributed.checkpoint import metadata

    return metadata.Metadata(dict(state), planner, dict(places))


def _chunks(at: Path, boxes: list[Any], shape: tuple[int, ...]) -> Command:
    """A tensor of these chunks, all of which are one item of the file."""
    import torch
    from torch.distributed.checkpoint import metadata as dcp
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    chunks = [dcp.ChunkStorageMetadata(torch.Size(b.offsets), torch.Size(b.sizes)) for b in boxes]
    properties = dcp.TensorProperties(torch.uint8)
    tensors = {"w": dcp.TensorStorageMetadata(properties, torch.Size(shape), chunks)}
    places = {
        dcp.MetadataIndex("w", torch.Size(box.offsets)): _StorageInfo("__0_0.distcp", 0, 1_000_000)
        for box in boxes
    }
    command = _dcp(at, _described(tensors, {"w": ("w",)}, places))
    with open(at / "run" / "__0_0.distcp", "wb") as file:
        file.truncate(1_000_000)
    return command


@register
def a_spiral_of_chunks(at: Path) -> Command:
    return _chunks(at, *spiral(8_000))


@register
def pinwheels_of_chunks(at: Path) -> Command:
    return _chunks(at, *pinwheels(80))


@register
def a_grid_of_chunks(at: Path) -> Command:
    return _chunks(at, *grid(180))


@register
def chunks_that_all_overlap(at: Path) -> Command:
    from reshard.core.tensors import Box

    count = 30_000
    shape = (2 * count, 2 * count)
    return _chunks(at, [Box(shape, (n, n), (count, count)) for n in range(count)], shape)


@register
def a_path_of_100000_steps(at: Path) -> Command:
    path = ("a",) * 100_000
    return _dcp(at, _described({}, {".".join(path): path}, {}))


@register
def many_long_paths(at: Path) -> Command:
    from torch.distributed.checkpoint import metadata as dcp

    paths = {".".join(p): p for p in (("a",) * 127 + (str(n),) for n in range(8_000))}
    state = {key: dcp.BytesStorageMetadata() for key in paths}
    return _dcp(at, _described(state, paths, {}))


@register
def a_blob_of_many_parts(at: Path) -> Command:
    """A `.metadata` of 20 MB that is cut off."""
    command = a_grid_of_chunks(at)
    path = at / "run" / ".metadata"
    path.write_bytes(path.read_bytes()[:-1])
    return command


# Megatron.


def _megatron(at: Path, **texts: bytes) -> Command:
    command = _dcp(at, _described({}, {}, {}))
    (at / "run" / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    for name, content in texts.items():
        (at / "run" / name.replace("_dot_", ".")).write_bytes(content)
    return command


def _megatron_of(filler: bytes) -> Maker:
    """A run_config.yaml of 4 MB beside weights that are read."""

    def make(at: Path) -> Command:
        import shutil

        from tests.hostile.places import GOLDEN

        shutil.copytree(GOLDEN / "megatron" / "bridge_llama_tp2_bf16" / "checkpoint", at / "run")
        (path,) = (at / "run").rglob("run_config.yaml")
        path.write_bytes(filler * ((4 << 20) // len(filler)))
        return "inspect", at / "run"

    return make


INPUTS["settings of blank lines"] = _megatron_of(b"\n")
INPUTS["settings of spaces"] = _megatron_of(b" ")
INPUTS["settings of letters"] = _megatron_of(b"a")
INPUTS["settings of colons"] = _megatron_of(b"a:\n")
INPUTS["settings of names"] = _megatron_of(b"aaaa: 1\nb" + b"b" * 40 + b":  \n")


# Archives.


@register
def an_archive_of_many_storages(at: Path) -> Command:
    count = 60_000
    members = [Member(f"a/data/{n}", b"\0" * 4) for n in range(count)]
    one = tensor(size=(1,), numel=1)
    body = b"}(" + b"".join(
        text(f"w{n}") + one.replace(storage(numel=1), storage(str(n), 1)) for n in range(count)
    )
    (at / "run.pt").write_bytes(archive(Member("a/data.pkl", pickled(body + b"u")), *members))
    return "inspect", at / "run.pt"


#: These, and those of `inputs`.
ALL = INPUTS
