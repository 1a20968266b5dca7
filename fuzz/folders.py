"""Targets that are one file of a sound checkpoint: the folder is read with the file changed.

Of a torch.save file the pickle is changed, and the zip around it made anew, so that its checksums
agree: by random bytes they never would. What is accepted of a small file that only states what
others state must be the checkpoint as it was; else nothing may differ but what the file says.
"""

from __future__ import annotations

import shutil
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path

from msgspec import Struct

import reshard
from reshard.errors import ReshardError
from tests.torchfile.handmade import Member, archive
from tests.torchfile.test_properties import ATOMS

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
# What the tables of names, shapes and dtypes of a checkpoint are.
_Table = dict[str, tuple[object, ...]]
# Strings, numbers and names of classes that these files hold, as pickles spell them.
_WORDS = (
    "state", "param_groups", "params", "exp_avg", "step", "shape", "mesh", "_spec", "placements",
    "_local_tensor", "shard_offsets", "shard_sizes", "shards_metadata", "world_size", "args",
    "cat_dim",
    "param_shapes", "ds_version", "partition_count", "zero_stage", "slice_mappings", "fragments",
)  # fmt: skip
STATE_ATOMS = (
    *ATOMS,
    *(b"\x8c" + bytes([len(word)]) + word.encode() for word in _WORDS),
    b"J\xff\xff\xff\x7f", b"\x8a\x09" + b"\xff" * 8 + b"\0", b"K\0", b"K\2", b"N\x85", b"\x88",
    b"]", b"h\2", b"h\5", b"h\x0b", b"h\x20", b"j\0\1\0\0", b"G" + bytes(8), b"K\1K\2\x86",
    b"(K\1K\1t",
)  # fmt: skip


class Place(Struct, frozen=True):
    """A file of a golden checkpoint: the archive of `state`, or the folder, and the file's path.

    `states`: it says what other files say, so that all that is accepted of it is the same.
    """

    golden: str
    file: str
    states: bool = False

    def copied(self, folder: Path) -> Path:
        """The checkpoint, copied once."""
        run = folder / "run"
        if run.exists():
            return run
        if self.golden.startswith("state/"):
            with tarfile.open(GOLDEN / f"{self.golden}.tar.xz") as packed:
                packed.extractall(run, filter="data")
        else:
            shutil.copytree(GOLDEN / self.golden / "checkpoint", run)
        return run

    def path(self, run: Path) -> Path:
        """The file that is changed."""
        return sorted(run.rglob(self.file))[0]


def _pickle(path: Path) -> tuple[str, bytes, list[Member]]:
    """The name of a zip's pickle, the pickle, and the other members."""
    with zipfile.ZipFile(path) as opened:
        members = {entry.filename: opened.read(entry) for entry in opened.infolist()}
    name = next(name for name in members if name.endswith("data.pkl"))
    others = [Member(n, content) for n, content in members.items() if n != name]
    return name, members[name], others


def seeds(place: Place) -> Callable[[], list[bytes]]:
    """The file as it is, or its pickle."""

    def make() -> list[bytes]:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            path = place.path(place.copied(Path(folder)))
            if zipfile.is_zipfile(path) and path.suffix in (".pt", ".bin"):
                return [_pickle(path)[1]]
            return [path.read_bytes()]

    return make


@cache
def _prepared(place: Place, folder: Path) -> tuple[Path, Path, str, tuple[Member, ...], _Table]:
    run = place.copied(folder)
    path = place.path(run)
    zipped = zipfile.is_zipfile(path) and path.suffix in (".pt", ".bin")
    name, _, others = _pickle(path) if zipped else ("", b"", [])
    return run, path, name, tuple(others), _table(run)


def reader(place: Place) -> Callable[[bytes, Path], None]:
    """Reads the checkpoint with the file's content, or its pickle, exchanged."""

    def read(data: bytes, folder: Path) -> None:
        run, path, name, others, sound = _prepared(place, folder)
        path.write_bytes(archive(Member(name, data), *others) if name else data)
        with suppress(ReshardError):
            found = _table(run)
            if place.states:
                assert found == sound, {
                    k: (found.get(k), sound.get(k)) for k in found.keys() ^ sound.keys()
                }
        with suppress(ReshardError):
            reshard.inspect(run, optimizer=True)

    return read


def _table(run: Path) -> _Table:
    tensors = reshard.open(run).tensors
    return {name: (tensors[name].shape, tensors[name].dtype) for name in tensors}


_MEGATRON = "megatron/mcore012_llama_dp2_distopt_modelspace_bf16"
PLACES: Mapping[str, Place] = {
    "megatron metadata": Place("megatron/bridge_llama_tp2_bf16", ".metadata"),
    "megatron json": Place("megatron/bridge_llama_tp2_bf16", "metadata.json", states=True),
    "megatron common": Place(_MEGATRON, "common.pt"),
    "megatron settings": Place("megatron/bridge_llama_tp2_bf16", "run_config.yaml", states=True),
    "dtensor": Place("ranks/lora-only", "model_world_size_2_rank_1.pt"),
    "sharded tensor": Place("ranks/tied", "model_world_size_3_rank_1.pt"),
    "local state": Place("ranks/local-slices", "pytorch_model_fsdp_rank1.bin"),
    "fsdp config": Place("ranks/lora-only", "fsdp_config.json", states=True),
    "lora meta": Place("ranks/lora-only", "lora_train_meta.json", states=True),
    "verl optimizer": Place("state/fsdp2_verl_fp32", "optim_world_size_2_rank_1.pt"),
    "verl extra": Place("state/fsdp2_verl_fp32", "extra_state_world_size_2_rank_0.pt"),
    "zero optimizer": Place("state/ds_s1_bf16", "*_rank_1_mp_rank_00_optim_states.pt"),
    "zero model": Place("state/ds_s1_bf16", "mp_rank_00_model_states.pt"),
    "zero3 model": Place("zero3", "zero_pp_rank_0_mp_rank_00_model_states.pt"),
    "zero3 optimizer": Place("zero3", "*_rank_0_mp_rank_00_optim_states.pt"),
    "universal": Place("state/uc_s2_fp32", "lm_head.weight/fp32.pt"),
    "universal model": Place("state/uc_s2_fp32", "mp_rank_00_model_states.pt"),
    "universal step": Place("state/uc_s2_fp32", "model.embed_tokens.weight/step.pt"),
    "scheduler": Place("state/fsdp2_accelerate_bf16", "scheduler.pt"),
    "optimizer metadata": Place("state/fsdp2_nested_fp32", ".metadata"),
}
