"""DeepSpeed checkpoints: no ZeRO, ZeRO-1, 2 and 3, as `engine.save_checkpoint` writes them.

    ROOT/latest                                       the tag of the last save
    ROOT/<tag>/mp_rank_00_model_states.pt             stages 0 to 2: all weights, 16-bit or fp32
    ROOT/<tag>/zero_pp_rank_0_mp_rank_00_model_states.pt   stage 3: shapes, buffers, one a rank
    ROOT/<tag>/[bf16_]zero_pp_rank_0_mp_rank_00_optim_states.pt   fp32 masters, one a rank

    stages 1 and 2: a group's parameters back to back, cut into equal partitions
        |  a  |    b     | c |  d  |pad|
        |   rank 0   |   rank 1   | rank 2 |
    stage 3: every parameter cut into equal pieces; a rank's flat group is its pieces
        rank 0: |a0|b0|c0|   rank 1: |a1|b1|c1|

Files of several mp ranks are those of tensor parallelism (tensor_parallel.py) or, beside files of
layers, of a pipeline's stages (pipeline.py). Files of experts are those of DeepSpeed's mixtures of
experts (experts.py), a folder `zero` is that of a universal checkpoint (universal.py), which is
what is written (layout.py).

Weights are read from the fp32 masters; frozen parameters and buffers from the model file, which is
the only place that has them. Moments are read only on request (state.py). Read off DeepSpeed 0.19.8
(runtime/engine.py, runtime/zero/stage_1_and_2.py, stage3.py, utils/zero_to_fp32.py) and files that
it wrote; older versions from their sources.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from reshard.core.catalog import Catalog
from reshard.formats import Selection, TensorToWrite
from reshard.formats.deepspeed import place
from reshard.storage.local import Sources

if TYPE_CHECKING:
    from reshard.core.state import TrainingState
    from reshard.formats import Laid

# Every conversion asks each format whether it knows the folder: what that takes is imported above,
# the rest by those who need it.


def detect(path: Path) -> str | None:
    """A tag folder, or a folder with `latest` or with tag folders."""
    return place.reason(path)


def read(path: Path, sources: Sources, selection: Selection) -> Catalog:
    """The tensors of the checkpoint that `selection.tag` (default: `latest`) names."""
    from reshard.formats.deepspeed import reading

    return reading.read(path, sources, selection)


def as_written(state: TrainingState, _: str | None) -> TrainingState:
    """The state with complete groups, whose switches suit what DeepSpeed loads."""
    from reshard.formats.deepspeed import layout

    return layout.as_written(state)


def lay_out_state(
    weights: Sequence[TensorToWrite],
    state: TrainingState,
    max_file_nbytes: int,
    layout: str | None,
) -> Laid:
    """The files of a universal checkpoint."""
    from reshard.formats.deepspeed import layout as universal

    return universal.lay_out_state(weights, state, max_file_nbytes, layout)
