"""megatron-core's own optimizers train and save: `python -m tests.megatron.training FOLDER`.

FOLDER/NAME/base/          the Hugging Face model, tiny, of random weights, that the training has
FOLDER/NAME/run/           latest_checkpointed_iteration.txt, iter_0000003/
FOLDER/NAME/truth.pt       {"param" | "exp_avg" | "exp_avg_sq": {the model's own name: ..}}

Two ranks of data parallelism, forked from one process; experts over both where there are any.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from demo.cpu_megatron import without_gpu
from tests.forking import run_ranks
from tests.megatron import mcore
from tests.megatron.models import model as hub_model
from tests.oracle.models import next_token_loss

_STEPS, _ITERATION = 2, 3
_LENGTH = 12


class Case(NamedTuple):
    """How a model is trained and saved. `sharding`: of the distributed optimizer; None: plain."""

    name: str
    family: str = "qwen2"
    bf16: bool = True
    sharding: str | None = None
    expert: int = 1
    avoid_prefix: bool = False


CASES = (
    Case("plain-bf16"),
    Case("plain-fp32", bf16=False),
    Case("reshardable", sharding="fully_reshardable"),
    Case("dp-reshardable", sharding="dp_reshardable"),
    Case("dp-zero", sharding="dp_zero_gather_scatter"),
    Case("experts", family="qwen3_moe", sharding="fully_reshardable", expert=2),
    Case("experts-plain", family="qwen3_moe", expert=2, avoid_prefix=True),
)


def main(folder: Path, names: list[str]) -> None:
    import megatron.core.models.gpt  # noqa: F401, imported once, before the ranks fork

    chosen = [case for case in CASES if not names or case.name in names]
    for case in chosen:
        hub_model(case.family, folder / case.name / "base")

    def work(rank: int, meeting: Path) -> None:
        _rank(rank, meeting, folder, chosen)

    codes = run_ranks(2, work)
    if any(codes):
        raise SystemExit(f"the ranks ended with {codes}")


class _OnCpu(TorchFunctionMode):  # type: ignore[misc]  # torch is untyped here
    """What the optimizers ask for on a GPU, made on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = dict(kwargs or {})
        if named.get("device") == "cuda":
            named["device"] = "cpu"
        return func(*args, **named)


def _called_as_on_a_gpu() -> None:
    """The optimizers sort parameters by what their types are called."""
    tensor: Any = torch.Tensor
    own = tensor.type

    def name(self: Any, *wanted: Any, **more: Any) -> Any:
        found = own(self, *wanted, **more)
        if not isinstance(found, str) or "cuda" in found:
            return found
        return found.replace("torch.", "torch.cuda.", 1)

    tensor.type = name


def _rank(rank: int, meeting: Path, folder: Path, cases: list[Case]) -> None:
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    torch.set_num_threads(1)
    without_gpu()
    _called_as_on_a_gpu()
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    # What passes its writers' results on is a process that it spawns, which imports all this again.
    filesystem_async._results_queue = multiprocessing.get_context("fork").Manager().Queue()
    for case in cases:
        parallel_state.initialize_model_parallel(expert_model_parallel_size=case.expert)
        torch.manual_seed(5)
        with _OnCpu():
            _case(rank, case, folder / case.name)
        dist.barrier()
        parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def _case(rank: int, case: Case, place: Path) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    config = json.loads((place / "base" / "config.json").read_text(encoding="utf-8"))
    module = mcore.built(config, mcore.Case(case.name, case.family, expert=case.expert)).train()
    module = module.bfloat16() if case.bf16 else module
    distributed = case.sharding is not None
    wrapped = DistributedDataParallel(
        module.config,
        DistributedDataParallelConfig(
            use_distributed_optimizer=distributed, overlap_grad_reduce=False
        ),
        module,
    )
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=0.01,
            weight_decay=0.1,
            bf16=case.bf16,
            params_dtype=torch.bfloat16 if case.bf16 else torch.float32,
            use_distributed_optimizer=distributed,
            clip_grad=0.0,
        ),
        [wrapped],
    )
    for group in optimizer.param_groups:  # as Megatron-LM's schedule sets it at each step
        group["weight_decay"] = 0.1 * group["wd_mult"]
    generator = torch.Generator().manual_seed(100 + rank)
    for _ in range(_STEPS):
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        _loss(wrapped, generator, config["vocab_size"]).backward()
        wrapped.finish_grad_sync()
        optimizer.step()
    metadata: dict[str, Any] = {"chained_optim_avoid_prefix": case.avoid_prefix}
    if distributed:
        metadata["distrib_optim_sharding_type"] = case.sharding
    run = place / "run" / f"iter_{_ITERATION:07d}"
    if rank == 0:
        run.mkdir(parents=True)
        (place / "run" / "latest_checkpointed_iteration.txt").write_text(str(_ITERATION))
    dist.barrier()
    model_state = module.sharded_state_dict(metadata=metadata)
    state = {
        "model": model_state,
        "optimizer": optimizer.sharded_state_dict(model_state, metadata=metadata),
        "checkpoint_version": 3.0,
        "iteration": _ITERATION,
        "opt_param_scheduler": {"max_lr": 0.01, "num_steps": 3},
    }
    dist_checkpointing.save(state, str(run), ("torch_dist", 1), content_metadata=metadata)
    _write_truth(rank, optimizer, module, place)


def _loss(model: Any, generator: torch.Generator, vocabulary: int) -> torch.Tensor:
    ids = torch.randint(vocabulary, (2, _LENGTH), generator=generator)
    positions = torch.arange(_LENGTH).expand_as(ids)
    later = torch.triu(torch.ones(_LENGTH, _LENGTH, dtype=torch.bool), 1)[None, None]
    logits = model(ids, positions, later)[..., :vocabulary]
    return next_token_loss(logits, ids)


def _write_truth(rank: int, optimizer: Any, module: Any, place: Path) -> None:
    """What the optimizers of all ranks hold of each parameter. A collective."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    mine: dict[str, dict[str, Any]] = {}
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        for name, held in _held(one, names):
            mine[_global(name, module)] = held
    everyone: list[Any] = [None, None]
    dist.all_gather_object(everyone, mine)
    if rank:
        return
    truth: dict[str, dict[str, torch.Tensor]] = {"param": {}, "exp_avg": {}, "exp_avg_sq": {}}
    for name in dict.fromkeys(name for held in everyone for name in held):
        parts = [held[name] for held in everyone if name in held]
        shape = parts[0]["shape"]
        for kind, table in truth.items():
            if "range" not in parts[0]:
                table[name] = parts[0][kind].reshape(shape)
                continue
            whole = torch.zeros(shape.numel())
            for part in parts:
                start, end = part["range"]
                whole[start:end] = part[kind]
            table[name] = whole.reshape(shape)
    torch.save(truth, place / "truth.pt")


def _held(optimizer: Any, names: dict[Any, str]) -> Any:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    if isinstance(optimizer, DistributedOptimizer):
        for parameter in optimizer.model_param_gbuf_map:
            part = optimizer._get_model_param_range_map(parameter)["param"]
            state = optimizer._get_main_param_and_optimizer_states(parameter)
            held = {kind: tensor.detach().clone().float() for kind, tensor in state.items()
                    if isinstance(tensor, torch.Tensor)}  # fmt: skip
            yield names[parameter], {
                **held, "range": (part.start, part.end), "shape": parameter.shape
            }  # fmt: skip
        return
    pairs = []
    if hasattr(optimizer, "float16_groups"):
        for low, high in zip(
            optimizer.float16_groups, optimizer.fp32_from_float16_groups, strict=True
        ):
            pairs += list(zip(low, high, strict=True))
        pairs += [(p, p) for group in optimizer.fp32_from_fp32_groups for p in group]
    else:
        pairs = [(p, p) for group in optimizer.optimizer.param_groups for p in group["params"]]
    for parameter, main in pairs:
        state = optimizer.optimizer.state[main]
        yield (
            names[parameter],
            {
                "param": main.detach().clone(),
                "exp_avg": state["exp_avg"].clone(),
                "exp_avg_sq": state["exp_avg_sq"].clone(),
                "shape": parameter.shape,
            },
        )


def _global(name: str, module: Any) -> str:
    """An expert's parameter by its number among all; the ranks have each a part of them."""
    from megatron.core import parallel_state

    parts = re.fullmatch(r"(.+\.experts\.local_experts)\.(\d+)\.(.+)", name)
    if parts is None:
        return name
    mine = module.config.num_moe_experts // parallel_state.get_expert_model_parallel_world_size()
    number = int(parts[2]) + mine * parallel_state.get_expert_model_parallel_rank()
    return f"{parts[1].removesuffix('.local_experts')}.experts.{number}.{parts[3]}"


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
