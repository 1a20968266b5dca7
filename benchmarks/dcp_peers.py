"""What people convert FSDP checkpoints with today; each runs in a process of its own.

python -m benchmarks.dcp_peers PEER SOURCE BASE TARGET
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path


def dcp_to_torch_save(source: str, base: str, target: str) -> None:
    """torch's own tool, then the base's class and `save_pretrained`."""
    import torch
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save as convert
    from transformers import AutoConfig, AutoModelForCausalLM

    with tempfile.TemporaryDirectory(dir=Path(target).parent) as scratch:
        file = Path(scratch, "model.pt")
        convert(source, file)
        state = torch.load(file, mmap=True, weights_only=True)["model"]
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
        model.load_state_dict(state)
        model.to(torch.bfloat16).save_pretrained(target)


def load_model(source: str, base: str, target: str) -> None:
    """The common script: the whole model, `dcp.load` into it, `save_pretrained`."""
    import torch
    from torch.distributed import checkpoint as dcp
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(base), dtype=torch.bfloat16
    )
    dcp.load({"model": model.state_dict()}, checkpoint_id=source, no_dist=True)
    model.save_pretrained(target)


def merge_weights(source: str, base: str, target: str) -> None:
    """`accelerate merge-weights`: safetensors alone, in the checkpoint's dtype."""
    from accelerate.utils import merge_fsdp_weights

    merge_fsdp_weights(source, target)


def load_and_save(source: str, base: str, target: str) -> None:
    """Into DCP, the common way: load all, then `dcp.save`."""
    from safetensors.torch import load_file
    from torch.distributed import checkpoint as dcp

    state = {}
    for file in sorted(Path(source).glob("*.safetensors")):
        state.update(load_file(file))
    dcp.save(state, checkpoint_id=target, no_dist=True)


PEERS = {
    peer.__name__: peer for peer in (dcp_to_torch_save, load_model, merge_weights, load_and_save)
}

if __name__ == "__main__":
    if len(sys.argv) != 5 or sys.argv[1] not in PEERS:
        sys.exit(f"{__doc__}\nPEER: {', '.join(PEERS)}")
    PEERS[sys.argv[1]](*sys.argv[2:])
