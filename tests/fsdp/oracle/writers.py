"""Saving a sharded state dict with each writer and option of torch's distributed checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import distributed
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint._extension import ZStandard
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import SerializationFormat
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from tests.fsdp.oracle.cases import Writer

State = dict[str, Any]


def save(state: State, folder: Path, writer: Writer, flatten: bool = True) -> None:
    """Save `state` under `folder`; every rank calls it."""
    planner = DefaultSavePlanner(flatten_state_dict=flatten)
    if writer == "async":
        dcp.async_save(state, checkpoint_id=str(folder), planner=planner).result()
    elif writer == "hf-full":
        # This writer is for one rank: two would write the same file names over each other.
        if distributed.get_rank() == 0:
            dcp.save(state, storage_writer=_hugging_face(folder, state), no_dist=True)
    elif writer == "no-collectives":
        dcp.save(state, checkpoint_id=folder, planner=planner, use_collectives=False)
    else:
        dcp.save(state, storage_writer=_WRITERS[writer](folder, state), planner=planner)


def _hugging_face(folder: Path, state: State, **options: bool) -> HuggingFaceStorageWriter:
    names = sorted(state)
    files = {name: 1 + (index >= len(names) // 2) for index, name in enumerate(names)}
    return HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=files, **options)


_WRITERS: dict[str, Callable[[Path, State], dcp.FileSystemWriter]] = {
    "default": lambda folder, _: dcp.FileSystemWriter(folder),
    "file-per-item": lambda folder, _: dcp.FileSystemWriter(folder, single_file_per_rank=False),
    "threads": lambda folder, _: dcp.FileSystemWriter(folder, thread_count=3),
    "safetensors": lambda folder, _: dcp.FileSystemWriter(
        folder, serialization_format=SerializationFormat.SAFETENSORS
    ),
    "zstd": lambda folder, _: dcp.FileSystemWriter(folder, _extensions=[ZStandard()]),
    "hf-sharded": lambda folder, state: _hugging_face(folder, state, save_distributed=True),
    "hf-consolidated": lambda folder, state: _hugging_face(
        folder, state, save_distributed=True, enable_consolidation=True
    ),
}
