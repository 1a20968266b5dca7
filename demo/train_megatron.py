"""Load a torch_dist folder into a Megatron model, fine-tune it on the lesson, and save it.

    torchrun --standalone --nproc-per-node 2 -m demo.train_megatron BASE START CHECKPOINT

BASE gives the config and the tokenizer only; the weights come from START, which reshard wrote, and
megatron-core itself loads and saves. Each rank holds the whole model and learns half of the lesson.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import distributed, nn
from transformers import AutoConfig, AutoTokenizer

from demo.cpu_megatron import without_gpu
from demo.lesson import TAUGHT, encode

# Ten steps at this rate teach the fact, as in the DeepSpeed story.
STEPS = 10
LEARNING_RATE = 5e-5


def built(config: Any) -> Any:
    """The GPTModel of a Llama's config, with random weights in float32."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    settings = TransformerConfig(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        kv_channels=config.hidden_size // config.num_attention_heads,
        normalization="RMSNorm",
        layernorm_epsilon=config.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        # Kernels of a GPU.
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
    )
    return GPTModel(
        settings,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=-(-config.vocab_size // 128) * 128,
        max_sequence_length=config.max_position_embeddings,
        share_embeddings_and_output_weights=config.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_base=int(config.rope_parameters["rope_theta"]),
    )


def load(model: Any, start: str) -> None:
    """Fill the model from a torch_dist folder, by megatron-core's own loader."""
    from megatron.core import dist_checkpointing

    content = dist_checkpointing.load_content_metadata(start)
    state = {"model": model.sharded_state_dict(metadata=dict(content))}
    model.load_state_dict(dist_checkpointing.load(state, start)["model"])


def loss_of(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The mean loss of the answers' tokens."""
    ids, labels = inputs["input_ids"], inputs["labels"]
    length = ids.shape[1]
    positions = torch.arange(length).expand_as(ids)
    later = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)[None, None]
    logits = model(ids, positions, later)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def main(base: str, start: str, checkpoint: str) -> None:
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    # It says of each layer that kernels of a GPU are not installed.
    warnings.filterwarnings("ignore", module="megatron")
    without_gpu()
    from megatron.core import dist_checkpointing, parallel_state

    distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    torch.manual_seed(0)
    rank, world = distributed.get_rank(), distributed.get_world_size()
    model = built(AutoConfig.from_pretrained(base))
    load(model, start)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    inputs = encode(AutoTokenizer.from_pretrained(base), TAUGHT[rank::world])
    for step in range(1, STEPS + 1):
        loss = loss_of(model, inputs)
        loss.backward()
        for parameter in model.parameters():
            distributed.all_reduce(parameter.grad)
            parameter.grad /= world
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0:
            print(f"step {step:2d} of {STEPS}   loss {loss.item():.4f}", flush=True)
    if rank == 0:
        Path(checkpoint).mkdir(parents=True)
    distributed.barrier()
    state = {"model": model.sharded_state_dict(), "checkpoint_version": 3.0, "iteration": STEPS}
    dist_checkpointing.save(state, checkpoint, ("torch_dist", 1))
    distributed.destroy_process_group()


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2], sys.argv[3])
