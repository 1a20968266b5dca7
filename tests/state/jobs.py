"""What the ranks are told to do, as data: it travels to their process as a line of JSON."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

Engine = Literal["zero0", "zero1", "zero2", "zero3", "fsdp1", "fsdp2"]
#: How a framework lays out what it saves. `deepspeed` and `universal` are DeepSpeed's, the others
#: DCP's: LightRFT's two folders, accelerate's, one folder with both parts, and that flattened.
#: `full`: accelerate's two files of FULL_STATE_DICT. `verl`, `ranks`, `script`: a file for each
#: rank, verl's, accelerate's with use_dcp=False, and a script's own (`model_rank0.pt`,
#: `optim_rank0.pt`); `ids`: FULL_STATE_DICT by numbers; `local`: accelerate's LOCAL_STATE_DICT.
#: `torchtitan`: one save, weights at the top.
Layout = Literal[
    "deepspeed", "universal", "lightrft", "accelerate", "full", "nested", "flat", "torchtitan",
    "verl", "ranks", "ids", "script", "local",
]  # fmt: skip
Kind = Literal["qwen2", "llama", "lora"]
Precision = Literal["float32", "bfloat16"]
#: torch's AdamW; DeepSpeed's own, their operators in torch: `muon` with its Adam, offloaded or not;
#: `compiled_cpu_adam`: with the operator itself, which is compiled first.
Optimizer = Literal[
    "torch", "cpu_adam", "compiled_cpu_adam", "fused_adam", "muon", "muon_offloaded"
]


class Place(Struct, frozen=True):
    """A checkpoint: the folder that is passed to the framework, and its layout."""

    folder: str
    layout: Layout


class Job(Struct, frozen=True):
    """A part of a training run: `steps` from `[0]` up to and without `[1]`, counted from 1.

    Without `load` it begins with the model's first weights; with `load` they are spoilt before.
    `precision` is that of the forward pass, over float32 masters. `groups` is how many parameter
    groups the optimizer has; with `spoilt` it is made with other hyperparameters, which the
    checkpoint's must replace. With `schedule` DeepSpeed loads the schedule's state,
    too. `after` are lines that the script runs after `load_checkpoint`, with `engine` and `folder`,
    the tag's, at hand. FSDP1 wraps the layers if `wrapped`, makes flat parameters of them if `flat`
    (use_orig_params=False), and replicates them if `hybrid`. With `every` the groups have what is
    frozen, too. `optimizer` is which one ZeRO wraps. `more` are other places to save at. The
    results go to the folder `out`: see `engines.record`.
    """

    engine: Engine
    world: int
    out: str
    steps: tuple[int, int]
    load: Place | None = None
    save: Place | None = None
    kind: Kind = "qwen2"
    precision: Precision = "float32"
    frozen: bool = True
    groups: int = 2
    spoilt: bool = False
    after: str = ""
    schedule: bool = True
    wrapped: bool = False
    flat: bool = False
    hybrid: bool = False
    every: bool = False
    optimizer: Optimizer = "torch"
    more: tuple[Place, ...] = ()


class Result(Struct, frozen=True):
    """What a job's rank 0 wrote down: the loss of each step, and the optimizer as it began.

    `losses` are means over all ranks. `groups` are the parameter groups' hyperparameters, `steps`
    the different step counts of the optimizer's state, both before the first step of the job.
    """

    losses: tuple[float, ...]
    groups: tuple[dict[str, object], ...]
    steps: tuple[float, ...]
    client: dict[str, object]
