"""What the oracle makes: each `Recipe` is one training run with the real DeepSpeed, as data.

A recipe is picked by name (`oracle["zero3-bf16-w2"]` in tests). Names of the classic grid are
`zero<stage>-<fp32|bf16>-w<world>`; every other recipe bears the feature it is there for.

fp16 runs are `ON_GPU`: "Type fp16 is not supported on your device" is what a CPU gives (engine.py,
`_do_sanity_check`).

Not made here, because DeepSpeed 0.19.8 cannot do it on a CPU machine (deepspeed/runtime):
- 0-d parameters with more than one rank: the engine's broadcast views each parameter as bytes,
  which torch refuses for a 0-d tensor. 0-d buffers are in every recipe.
- A step of ZeRO-3 with a parameter without elements: it never becomes AVAILABLE. That recipe saves
  before the first step.
- MiCS: removed in 0.19.8. NVMe offload, the Fast and Decoupled writers: need libaio. Nebula and
  DataStates: need their services.
DeepSpeedCPUAdam (`CPUAdam`) is real, but for its operator, which would have to be compiled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Stage = Literal[0, 1, 2, 3]
DTypeName = Literal["float32", "bfloat16", "float16"]
ModelName = Literal["rich", "empty", "many", "llama", "llama-tied", "lora", "lora-tied"]
# How the trainable parameters are split over the optimizer's parameter groups:
# all in one; weight decay or none; the same with every one-element parameter in a third.
Groups = Literal["one", "decay", "three"]
Options = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Save:
    """One `save_checkpoint`, after `steps` more steps of training."""

    tag: str = "global_step2"
    steps: int = 2
    latest: bool = True
    exclude_frozen: bool = False


@dataclass(frozen=True, slots=True)
class Recipe:
    """One training run: `world` ranks, ZeRO `stage`, and what is special about it.

    `zero` and `config` are merged into the `zero_optimization` section and the top level of the
    DeepSpeed configuration. `saves` are made one after the other under one root. `client_state`
    asks for user objects of every awkward kind in the checkpoint. `export_16bit` also calls
    `save_16bit_model`, `universal` also runs DeepSpeed's `ds_to_universal` on the last save.
    """

    name: str
    world: int
    stage: Stage
    dtype: DTypeName
    model: ModelName = "rich"
    groups: Groups = "decay"
    optimizer: str = "AdamW"
    zero: Options = field(default_factory=dict)
    config: Options = field(default_factory=dict)
    saves: tuple[Save, ...] = (Save(),)
    client_state: bool = False
    zero_init: bool = False
    export_16bit: bool = False
    universal: bool = False


_STAGES: tuple[Stage, ...] = (0, 1, 2, 3)


def _grid() -> list[Recipe]:
    """Every stage, element type and world size, on a model with every kind of tensor."""
    kinds: tuple[tuple[DTypeName, str], ...] = (("float32", "fp32"), ("bfloat16", "bf16"))
    return [
        Recipe(f"zero{stage}-{short}-w{world}", world, stage, dtype)
        for world in (1, 2, 3)
        for stage in _STAGES
        for dtype, short in kinds
    ]


_OFFLOAD: Options = {"offload_optimizer": {"device": "cpu"}}
_FP32_ACCUMULATION: Options = {"data_types": {"grad_accum_dtype": "fp32"}}
_EXCLUDED = (Save(exclude_frozen=True),)
_LEGACY: Options = {"checkpoint": {"checkpoint_serialization": False}}
_ROUND_ROBIN: Options = {"round_robin_gradients": True}

_LOW_MASTERS: Options = {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}
_AUTOCAST: Options = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}

_LAYOUTS = [
    Recipe("one-group", 3, 2, "bfloat16", groups="one"),
    Recipe("three-groups-zero1", 3, 1, "bfloat16", groups="three"),
    Recipe("three-groups-zero2", 3, 2, "float32", groups="three"),
    Recipe("three-groups-zero3", 3, 3, "bfloat16", groups="three"),
    Recipe("sub-groups", 2, 3, "bfloat16", zero={"sub_group_size": 8}),
    Recipe("sub-groups-w3", 3, 3, "float32", model="many", zero={"sub_group_size": 16}),
    Recipe("round-robin-zero1", 2, 1, "bfloat16", model="many", zero=_ROUND_ROBIN),
    Recipe("round-robin-zero2", 3, 2, "bfloat16", model="many", zero=_ROUND_ROBIN),
    Recipe("elastic-zero1", 2, 1, "bfloat16", zero={"elastic_checkpoint": True}),
    Recipe("elastic-zero2", 3, 2, "float32", zero={"elastic_checkpoint": True}),
    Recipe("bf16-optimizer", 2, 1, "bfloat16", config=_FP32_ACCUMULATION),
    Recipe("bf16-optimizer-w3", 3, 1, "bfloat16", groups="three", config=_FP32_ACCUMULATION),
    Recipe("aligned-bf16", 2, 2, "bfloat16", zero={"parameter_alignment": True}),
    Recipe("aligned-fp32", 3, 1, "float32", zero={"parameter_alignment": True}),
    Recipe("muon-zero2", 2, 2, "bfloat16", optimizer="Muon"),
    Recipe("muon-zero3", 2, 3, "bfloat16", optimizer="Muon", zero={"reduce_scatter": False}),
    Recipe("offload-zero1", 2, 1, "bfloat16", optimizer="CPUAdam", zero=_OFFLOAD),
    Recipe("offload-zero2", 2, 2, "bfloat16", optimizer="CPUAdam", zero=_OFFLOAD),
    Recipe("offload-zero3", 2, 3, "bfloat16", optimizer="CPUAdam", zero=_OFFLOAD),
    *(
        Recipe(
            f"low-masters-zero{stage}",
            2,
            stage,
            "bfloat16",
            optimizer="CPUAdam",
            zero=_OFFLOAD,
            config=_LOW_MASTERS,
        )
        for stage in (2, 3)
    ),
    Recipe("autocast-zero2", 2, 2, "float32", config=_AUTOCAST),
    Recipe("autocast-zero3", 2, 3, "float32", config=_AUTOCAST),
    Recipe("hpz", 2, 3, "bfloat16", zero={"zero_hpz_partition_size": 2}),
    Recipe("persistence-0", 2, 3, "bfloat16", zero={"stage3_param_persistence_threshold": 0}),
    Recipe("zero-init", 2, 3, "bfloat16", zero_init=True),
    Recipe("empty-zero1", 2, 1, "bfloat16", model="empty"),
    Recipe("empty-zero2", 2, 2, "bfloat16", model="empty"),
    Recipe("empty-zero3", 2, 3, "bfloat16", model="empty", saves=(Save(steps=0),)),
]

_SAVING = [
    Recipe("excluded-zero0", 2, 0, "bfloat16", saves=_EXCLUDED),
    Recipe("excluded-zero1", 2, 1, "bfloat16", saves=_EXCLUDED),
    Recipe("excluded-zero2", 2, 2, "bfloat16", saves=_EXCLUDED),
    Recipe("excluded-zero3", 2, 3, "bfloat16", saves=_EXCLUDED),
    Recipe("two-tags", 2, 2, "bfloat16", saves=(Save("global_step1", 1), Save("global_step2", 1))),
    Recipe("no-latest", 2, 2, "bfloat16", saves=(Save("only", latest=False),)),
    Recipe(
        "no-latest-two-tags",
        2,
        3,
        "bfloat16",
        saves=(Save("a", 1, latest=False), Save("b", 1, latest=False)),
    ),
    Recipe("odd-tag", 2, 3, "bfloat16", saves=(Save("épreuve 7, loss=0.5 [best].final"),)),
    Recipe("nested-tag", 2, 2, "bfloat16", saves=(Save("run 7/step-2"),)),
    Recipe("legacy-zero1", 2, 1, "bfloat16", config=_LEGACY),
    Recipe("legacy-zero2", 2, 2, "bfloat16", config=_LEGACY),
    Recipe("legacy-zero3", 2, 3, "bfloat16", config=_LEGACY),
    Recipe("client-state-zero2", 2, 2, "bfloat16", client_state=True),
    Recipe("client-state-zero3", 2, 3, "bfloat16", client_state=True),
    Recipe("export-16bit-zero2", 2, 2, "bfloat16", export_16bit=True),
    Recipe(
        "export-16bit-zero3",
        2,
        3,
        "bfloat16",
        export_16bit=True,
        zero={"stage3_gather_16bit_weights_on_model_save": True},
    ),
    Recipe("universal-zero2", 2, 2, "bfloat16", universal=True),
    Recipe("universal-zero3", 2, 3, "bfloat16", universal=True),
]

_MODELS = [
    Recipe("llama-zero2", 2, 2, "bfloat16", model="llama"),
    Recipe("llama-zero3", 2, 3, "bfloat16", model="llama"),
    Recipe("llama-tied-zero2", 2, 2, "bfloat16", model="llama-tied"),
    Recipe("llama-tied-zero3", 2, 3, "bfloat16", model="llama-tied"),
    Recipe("lora-zero2", 2, 2, "bfloat16", model="lora"),
    Recipe("lora-zero3", 2, 3, "bfloat16", model="lora"),
    # As the Hugging Face Trainer saves PEFT's models: the adapters, and what is left of a tie.
    Recipe("lora-tied-zero2", 2, 2, "bfloat16", model="lora-tied", saves=_EXCLUDED),
    Recipe("lora-tied-zero3", 2, 3, "bfloat16", model="lora-tied", saves=_EXCLUDED),
]

RECIPES: tuple[Recipe, ...] = (*_grid(), *_LAYOUTS, *_SAVING, *_MODELS)

# What needs a GPU: `make test` leaves it out where there is none. Several ranks share one GPU.
_LOW: tuple[tuple[DTypeName, str], ...] = (("float16", "fp16"), ("bfloat16", "bf16"))
_FUSED: tuple[Stage, ...] = (0, 2)
ON_GPU: tuple[Recipe, ...] = (
    *(
        Recipe(f"gpu-zero{stage}-{short}-w{world}", world, stage, dtype)
        for world in (1, 2)
        for stage in _STAGES
        for dtype, short in _LOW
    ),
    *(
        Recipe(f"gpu-fused-zero{stage}-fp16", 1, stage, "float16", optimizer="FusedAdam")
        for stage in _FUSED
    ),
    Recipe("gpu-offload-zero3-fp16", 1, 3, "float16", optimizer="CPUAdam", zero=_OFFLOAD),
    Recipe("gpu-llama-zero2-fp16", 1, 2, "float16", model="llama"),
    Recipe("gpu-llama-zero3-fp16", 1, 3, "float16", model="llama"),
)
BY_NAME: Mapping[str, Recipe] = {recipe.name: recipe for recipe in (*RECIPES, *ON_GPU)}

# Runs with more than data parallelism, by name; parallel.py makes them.
PARALLEL: tuple[str, ...] = (
    "pipeline",
    "experts",
    "tensor-parallel-zero1",
    "tensor-parallel-zero3",
)
