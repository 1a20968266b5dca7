"""What people convert with today; each runs in a process of its own.

python -m benchmarks.peers PEER SOURCE BASE TARGET
"""

from __future__ import annotations

import sys


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


PEERS = {peer.__name__: peer for peer in (zero_to_fp32, load_and_save)}

if __name__ == "__main__":
    if len(sys.argv) != 5 or sys.argv[1] not in PEERS:
        sys.exit(f"{__doc__}\nPEER: {', '.join(PEERS)}")
    PEERS[sys.argv[1]](*sys.argv[2:])
