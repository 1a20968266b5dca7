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

from pathlib import Path

from msgspec.structs import replace

from reshard.core.catalog import Catalog
from reshard.formats import Selection, of_several
from reshard.formats.deepspeed import (
    files,
    pipeline,
    place,
    stage3,
    stages012,
    state,
    tensor_parallel,
    universal,
)
from reshard.formats.deepspeed.files import Saved
from reshard.formats.deepspeed.layout import as_written, lay_out_state
from reshard.formats.deepspeed.place import Location
from reshard.storage.local import Sources

__all__ = ["as_written", "detect", "lay_out_state", "read"]


def detect(path: Path) -> str | None:
    """A tag folder, or a folder with `latest` or with tag folders."""
    return place.reason(path)


def read(path: Path, sources: Sources, selection: Selection) -> Catalog:
    """The tensors of the checkpoint that `selection.tag` (default: `latest`) names."""
    location = place.locate(path, sources, selection.tag)
    if location.layers and not location.universal:
        catalog = pipeline.read(location, sources)
    else:
        catalog = _read(location, sources, selection)
    models = () if selection.tag else place.several_models(path)
    return replace(
        catalog, findings=(*catalog.findings, *of_several(path, models, location.tag, "tag"))
    )


def _read(location: Location, sources: Sources, selection: Selection) -> Catalog:
    """What the files hold that are not of a pipeline's layers."""
    ranks = location.ranks
    saved = [files.read(rank, sources) for rank in ranks]
    if location.universal and saved[0].model[0].staged:
        return pipeline.of_universal(location, saved, sources)
    saved = tensor_parallel.check(location, saved, sources)
    parts = [
        _catalog(rank, one, sources, selection) for rank, one in zip(ranks, saved, strict=True)
    ]
    catalog = parts[0] if len(parts) == 1 else tensor_parallel.join(saved, parts, sources)
    return replace(catalog, optimizer=state.reader(ranks, saved, catalog, sources))


def _catalog(location: Location, saved: Saved, sources: Sources, selection: Selection) -> Catalog:
    """What the files of one model parallel rank hold."""
    if location.universal:
        return universal.catalog(location, saved, sources)
    if saved.stage == 3:
        return stage3.catalog(
            location, saved, sources, allow_step_mismatch=selection.allow_step_mismatch
        )
    return stages012.catalog(location, saved, sources)
