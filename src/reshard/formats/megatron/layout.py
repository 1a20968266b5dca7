"""Lay out a `torch_dist` folder, as one rank would have saved it. Pure, no I/O.

    __0_0.distcp ...   DCP's items: a chunk of each layer and expert, large ones cut into rows
    .metadata          DCP's
    common.pt          how layers and experts are named, for those who load it; no run's settings
    metadata.json      the backend's name

Megatron-Core's modules load a state beside their tensors, which holds data only in FP8. It is None
here, as modules without TransformerEngine save it; TransformerEngine's modules accept it too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from reshard.containers.dcp import layout
from reshard.containers.torch.write import lay_out_data
from reshard.core import rearrange
from reshard.core.plan import OutputFile, Texts
from reshard.core.regex import regex
from reshard.core.tensors import Box, Entry, TensorSpec
from reshard.formats import TensorToWrite
from reshard.formats.signs import MCORE, MCORE_COMMON
from reshard.naming.megatron_into import extra_states, leading_axes

_BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
# Bytes of a tensor that is one chunk, though it holds several layers: a norm's.
_SMALL = 1 << 20
# Older than 2.0, Megatron-LM would reorder queries, keys and values.
_CHECKPOINT_VERSION = 3.0
_OWN_LAYER = regex(r"decoder\.layers\.\d+\..+")


def lay_out(
    slots: Sequence[TensorToWrite], max_file_nbytes: int
) -> tuple[tuple[OutputFile, ...], Texts]:
    """Files and small files for tensors by Megatron-Core's names; aliases are further such
    names."""
    named = [
        (name, spec.shape) for spec, source, _ in slots for name in (spec.name, *source.aliases)
    ]
    nothing = lay_out_data([None])
    files, texts = layout.lay_out(
        slots, max_file_nbytes, cut=_cut, objects=dict.fromkeys(extra_states(named), nothing)
    )
    content = {
        "singleton_local_shards": False,
        "non_homogeneous_layers": any(_OWN_LAYER.fullmatch(name) for name, _ in named),
    }
    common = {
        "checkpoint_version": _CHECKPOINT_VERSION,
        "iteration": 0,
        "content_metadata": content,
    }
    backend = json.dumps(_BACKEND).encode()
    return files, (*texts, (MCORE_COMMON, lay_out_data(common)), (MCORE, backend))


def _cut(spec: TensorSpec, source: Entry, max_nbytes: int) -> Iterator[tuple[Box, Entry]]:
    axes = leading_axes(spec.name) if spec.nbytes > _SMALL else 0
    return _parts(spec, source, max_nbytes, axes)


def _parts(
    spec: TensorSpec, source: Entry, max_nbytes: int, axes: int
) -> Iterator[tuple[Box, Entry]]:
    """Chunks of one place along each of the first `axes`."""
    if axes == 0:
        yield from layout.by_rows(spec, source, max_nbytes)
        return
    inner = TensorSpec(spec.name, spec.dtype, spec.shape[1:])
    for index, row in enumerate(rearrange.rows(source)):
        for box, part in _parts(inner, row, max_nbytes, axes - 1):
            place = Box(spec.shape, (index, *box.offsets), (1, *box.sizes))
            yield place, rearrange.stack([part])
