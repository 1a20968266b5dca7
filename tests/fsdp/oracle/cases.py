"""What the oracle makes: each `Case` is one save by real torch processes, as data.

The ranks are CPU processes, but for `ON_GPU`, where items go by the loader that copies from the
GPU while it writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

ModelName = Literal["decoder", "tied", "odd", "dtypes"]
# How parameters lie over the ranks:
#   fsdp2     fully_shard on a 1-D mesh                fsdp1      FSDP1, sharded dict as DTensor
#   hsdp      fully_shard, 2 replicas of 2 shards      fsdp1-st   the same as ShardedTensor
#   fsdp-tp   fully_shard over tensor parallel, 2 x 2  fsdp1-local, fsdp1-flat  LOCAL_STATE_DICT
#   lightrft  fully_shard on a (1, world) mesh         shards     DTensor.from_local, no module
Sharding = Literal[
    "fsdp2", "hsdp", "fsdp-tp", "lightrft", "fsdp1", "fsdp1-st", "fsdp1-local", "fsdp1-flat",
    "shards",
]  # fmt: skip
# What is saved where; see `layouts.py`.
Layout = Literal[
    "plain", "lightrft", "accelerate", "accelerate-ranks", "titan", "nested", "app", "lightning",
    "extras", "unflattened", "local", "verl",
]  # fmt: skip
Writer = Literal[
    "default", "async", "file-per-item", "threads", "safetensors", "zstd", "no-collectives",
    "hf-sharded", "hf-consolidated", "hf-full",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Case:
    """One checkpoint of `world` ranks.

    `where` is the folder, inside the case's own, that a user would name. `dtype` is the
    parameters'. `onto` names an earlier case whose folder this one is saved over.
    """

    name: str
    world: int
    model: ModelName = "decoder"
    sharding: Sharding = "fsdp2"
    layout: Layout = "plain"
    writer: Writer = "default"
    dtype: str = "float32"
    where: str = "."
    onto: str = ""


CASES: tuple[Case, ...] = (
    Case("hsdp", 4, sharding="hsdp"),
    Case("fsdp-tp", 4, sharding="fsdp-tp"),
    Case("fsdp-tp-even", 4, sharding="fsdp-tp", dtype="bfloat16"),
    Case("fsdp1-w4", 4, sharding="fsdp1"),
    Case("odd-w4", 4, model="odd"),
    Case("stale-w4", 4),
    Case("fsdp2-w3", 3, dtype="bfloat16"),
    Case("odd-w3", 3, model="odd"),
    Case("fsdp1-st-w3", 3, sharding="fsdp1-st"),
    Case("dtypes-w3", 3, model="dtypes", sharding="shards"),
    Case("hf-sharded-w3", 3, model="odd", writer="hf-sharded"),
    Case("fsdp2-w2", 2),
    Case("fp16", 2, dtype="float16"),
    Case("tied", 2, model="tied"),
    Case("odd-w2", 2, model="odd"),
    Case("fsdp1", 2, sharding="fsdp1"),
    Case("fsdp1-st", 2, sharding="fsdp1-st"),
    Case("stale", 2, onto="stale-w4"),
    Case(
        "lightrft", 2, sharding="lightrft", layout="lightrft", dtype="bfloat16",
        where="_actor/global_step6",
    ),
    Case("accelerate", 2, layout="accelerate", where="pytorch_model_fsdp_0"),
    Case(
        "accelerate-fsdp1", 2, sharding="fsdp1-st", layout="accelerate",
        where="pytorch_model_fsdp_0",
    ),
    Case("titan", 2, layout="titan", where="step-5"),
    Case("nested", 2, layout="nested"),
    Case("app", 2, layout="app"),
    Case("lightning", 2, layout="lightning"),
    Case("extras", 2, layout="extras"),
    Case("unflattened", 2, layout="unflattened"),
    Case("async", 2, writer="async"),
    Case("file-per-item", 2, writer="file-per-item"),
    Case("threads", 2, model="odd", writer="threads"),
    Case("safetensors", 2, model="odd", writer="safetensors"),
    Case("safetensors-extras", 2, layout="extras", writer="safetensors"),
    Case("zstd", 2, writer="zstd"),
    Case("no-collectives", 2, model="odd", writer="no-collectives"),
    Case("hf-sharded", 2, writer="hf-sharded"),
    Case("hf-consolidated", 2, writer="hf-consolidated"),
    Case("hf-full", 2, writer="hf-full"),
    Case("fsdp1-local", 2, sharding="fsdp1-local", layout="local"),
    Case("fsdp1-flat", 2, sharding="fsdp1-flat", layout="local"),
    Case("accelerate-ranks", 2, layout="accelerate-ranks"),
    Case("verl", 2, layout="verl", where="global_step_3/actor"),
)  # fmt: skip
# What needs a GPU: `make test` leaves it out where there is none.
ON_GPU: tuple[Case, ...] = (
    Case("gpu-fsdp2", 1),
    Case("gpu-fsdp2-bf16", 1, dtype="bfloat16"),
    Case("gpu-fsdp2-fp16", 1, dtype="float16"),
    Case("gpu-fsdp1", 1, sharding="fsdp1"),
    Case("gpu-fsdp1-st", 1, sharding="fsdp1-st"),
    Case("gpu-odd", 1, model="odd"),
    Case("gpu-tied", 1, model="tied"),
    Case("gpu-async", 1, writer="async"),
    Case("gpu-threads", 1, model="odd", writer="threads"),
    Case("gpu-file-per-item", 1, writer="file-per-item"),
    Case("gpu-hf-sharded", 1, writer="hf-sharded"),
    Case("gpu-titan", 1, layout="titan", where="step-5"),
    Case(
        "gpu-lightrft", 1, sharding="lightrft", layout="lightrft", dtype="bfloat16",
        where="_actor/global_step6",
    ),
    Case("gpu-accelerate", 1, layout="accelerate", where="pytorch_model_fsdp_0"),
)  # fmt: skip
BY_NAME: Mapping[str, Case] = {case.name: case for case in (*CASES, *ON_GPU)}
