"""What LightRFT expects beside the DCP files of an actor (lightrft/strategy/fsdp/fsdpv2.py).

<ckpt_path>/_actor/global_step<N>/   of several the highest number is loaded
    .metadata, __0_0.distcp          asked for by the names that the loaded model has
    client_state.pt                  torch.save of {"consumed_samples": N}; a run that is resumed
                                     without it fails (KeyError)
    optim_states/, scheduler_state.pt  may be missing: a new optimizer and schedule
"""

from __future__ import annotations

from reshard.containers.torch.write import lay_out_data

CLIENT_STATE = "client_state.pt"
#: What of it a run that is resumed needs.
CONSUMED_SAMPLES = "consumed_samples"


def client_state(consumed_samples: int) -> tuple[str, bytes]:
    """The file that says how many samples a run has consumed: its name, and its bytes."""
    return CLIENT_STATE, lay_out_data({CONSUMED_SAMPLES: consumed_samples})
