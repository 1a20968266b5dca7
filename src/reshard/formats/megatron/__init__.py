"""Megatron-Core's distributed checkpoints (`torch_dist`): Megatron-LM, Megatron-Bridge, NeMo 2,
slime, ms-swift and verl's Megatron workers.

    run/latest_checkpointed_iteration.txt     "10", or "release"
    run/iter_0000010/metadata.json            {"sharded_backend": "torch_dist", ..}: written last
    run/iter_0000010/common.pt                the run's arguments and counters, no tensor of it
    run/iter_0000010/.metadata                as DCP's, with every rank's plan for the save
    run/iter_0000010/__0_0.distcp ...         DCP's items

    NAME/weights/                             NeMo 2, beside NAME/context/
    run/global_step_7/actor/dist_ckpt/        verl up to 0.8, beside actor/huggingface/
    run/global_step_7/actor/model/dist_ckpt/  verl 0.9; optimizer/ and extra/ lie beside model/

Tensors have their full shapes: tensor, pipeline, expert and data parallelism leave only chunks.
Here their names stay Megatron's; `reshard.naming.megatron` maps them to the hub's. Beside them lie
items that are not tensors (`_extra_state`, `rng_state`), which are not opened, and the state of the
optimizer. Read off megatron-core 0.12 and 0.16 (dist_checkpointing/), Megatron-LM, Megatron-Bridge,
verl 0.9.1, and files that megatron-core wrote.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from reshard.core.catalog import Catalog
from reshard.formats import Selection, TensorToWrite
from reshard.formats.megatron import folders
from reshard.storage.local import Sources

if TYPE_CHECKING:
    from reshard.core.plan import OutputFile, Texts

# Every conversion asks each format whether it knows the folder: what that takes is imported above,
# the rest by those who need it.


def detect(path: Path) -> str | None:
    """A folder with Megatron-Core's `metadata.json`, or one above it that a trainer writes; also
    kinds that are refused."""
    return folders.why(path)


def read(path: Path, sources: Sources, selection: Selection) -> Catalog:
    """The model's tensors by Megatron's names, each proven to be tiled by its chunks."""
    from reshard.formats.megatron import reading

    return reading.read(path, sources, selection)


def lay_out(
    slots: Sequence[TensorToWrite], max_file_nbytes: int
) -> tuple[tuple[OutputFile, ...], Texts]:
    """Files and small files for tensors by Megatron-Core's names."""
    from reshard.formats.megatron import layout

    return layout.lay_out(slots, max_file_nbytes)
