"""What people convert with today; each runs in a process of its own.

python -m benchmarks.peers PEER SOURCE BASE TARGET
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path


def zero_to_fp32(source: str, base: str, target: str) -> None:
    """DeepSpeed's own script, to safetensors: float32, names as in the checkpoint."""
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

    convert_zero_checkpoint_to_fp32_state_dict(source, target, safe_serialization=True)


def load_and_save(source: str, base: str, target: str) -> None:
    """The common script: masters into the model by DeepSpeed's function, then `save_pretrained`."""
    import torch
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model.load_state_dict(get_fp32_state_dict_from_zero_checkpoint(source))
    model.save_pretrained(target)


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


def dcp_load(source: str, base: str, target: str) -> None:
    """The common script: the whole model, `dcp.load` into it, `save_pretrained`."""
    import torch
    from torch.distributed import checkpoint as dcp
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base), dtype=torch.bfloat16)
    dcp.load({"model": model.state_dict()}, checkpoint_id=source, no_dist=True)
    model.save_pretrained(target)


def merge_weights(source: str, base: str, target: str) -> None:
    """`accelerate merge-weights`: safetensors alone, in the checkpoint's dtype."""
    from accelerate.utils import merge_fsdp_weights

    merge_fsdp_weights(source, target)


def dcp_save(source: str, base: str, target: str) -> None:
    """Into DCP, the common way: load all, then `dcp.save`."""
    from safetensors.torch import load_file
    from torch.distributed import checkpoint as dcp

    state = {}
    for file in sorted(Path(source).glob("*.safetensors")):
        state.update(load_file(file))
    dcp.save(state, checkpoint_id=target, no_dist=True)


def dequantise(source: str, base: str, target: str) -> None:
    """transformers' own loading, which dequantises where there is no GPU, and saving.

    Without `save_original_format=False` transformers 5.23 quantises again while it saves.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(target, save_original_format=False)


def ds_to_universal(source: str, base: str, target: str) -> None:
    """DeepSpeed's own converter of training state, which writes slices of all of it first."""
    from argparse import Namespace

    from deepspeed.checkpoint import ds_to_universal as own

    (tag,) = (path for path in Path(source).iterdir() if path.is_dir())
    own.main(
        Namespace(
            input_folder=str(tag),
            output_folder=target,
            num_extract_workers=2,
            num_merge_workers=2,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )


PEERS = {
    peer.__name__: peer
    for peer in (
        zero_to_fp32,
        load_and_save,
        dcp_to_torch_save,
        dcp_load,
        merge_weights,
        dcp_save,
        dequantise,
        ds_to_universal,
    )
}

if __name__ == "__main__":
    if len(sys.argv) != 5 or sys.argv[1] not in PEERS:
        sys.exit(f"{__doc__}\nPEER: {', '.join(PEERS)}")
    PEERS[sys.argv[1]](*sys.argv[2:])
