"""What a model file says of its run beside the weights: schedule, counters, the user's state.

DeepSpeed puts the user's `client_state` at the top of the model file, among its own keys; what is
not known as its own is the user's (runtime/engine.py, `_load_checkpoint`, hands all of it back).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from msgspec.structs import replace

from reshard.containers.torch import read as read_torch
from reshard.containers.torch.plain import PlainData
from reshard.core.state import TrainingState
from reshard.errors import FormatError
from reshard.storage.local import Sources

#: What DeepSpeed counts.
COUNTERS = ("global_steps", "global_samples", "skipped_steps")
# runtime/engine.py, `_common_checkpoint_state` and around it; checkpoint/constants.py.
_OWN = frozenset(
    {
        *COUNTERS,
        "module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes",
        "shared_params", "frozen_param_fragments", "lr_scheduler", "data_sampler", "random_ltd",
        "sparse_tensor_module_names", "dp_world_size", "mp_world_size", "ds_config", "ds_version",
        "num_experts", "ds_autoep_layers", "autoep_layers", "universal_checkpoint_info",
        "checkpoint_parallel_dimensions", "autoep_folding", "zero_stage", "csr_tensor_module_names",
    }
)  # fmt: skip
# Objects of DeepSpeed's data efficiency library; each is None where it is not used.
_LEFT_OUT = ("data_sampler", "random_ltd")


def model_file(path: Path, sources: Sources) -> dict[str, object]:
    """The keys of a model file. Raises `FormatError` where it is not a dict of them."""
    value = read_torch(sources.open(path)).value
    if not isinstance(value, dict):
        raise FormatError(f"it holds a {type(value).__name__}, not a dict.", path=path)
    return {key: held for key, held in value.items() if isinstance(key, str)}


def run_state(state: TrainingState, top: Mapping[str, object], plain: PlainData) -> TrainingState:
    """The state with what the model file, whose keys these are, says of the run."""
    scheduler = plain.state_dict(top.get("lr_scheduler"), "lr_scheduler")
    client = {key: value for key, value in top.items() if key not in _OWN}
    counted = ((key, top.get(key)) for key in COUNTERS)
    counters = {key: count for key, count in counted if type(count) is int}
    client_plain = plain.mapping(client)
    left = [key for key in _LEFT_OUT if top.get(key) is not None]
    return replace(
        state,
        scheduler=scheduler,
        counters=counters,
        client_state=client_plain,
        left_out=(*state.left_out, *left, *plain.left_out),
    )
