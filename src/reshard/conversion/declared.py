"""The options of a conversion, each declared once, and how they are parsed.

To add one: a line in `CONVERT`, a keyword in `reshard.convert`, a field in `Options`, which
`parsed` fills in. The flag, `--help`, docs/cli.md, the docstring and the tests of wrong values
follow from the line. Long because a conversion has some forty options.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct

from reshard import formats
from reshard.checkpoint import PREFIX, ROLE, TAG
from reshard.conversion.dtypes import CHOICES
from reshard.conversion.options import (
    ENGINES,
    LAYOUTS,
    LORA,
    MODEL_TYPES,
    NAMES,
    POOLINGS,
    SRM_FORMATS,
    LoraChoice,
    Options,
    Patterns,
    RewardChoice,
)
from reshard.conversion.writing import Writing
from reshard.core.findings import CODES
from reshard.core.options import (
    Choice,
    Codes,
    DTypeName,
    Flag,
    Function,
    Integer,
    Number,
    Option,
    Parsed,
    Place,
    Size,
    Text,
    Texts,
    parse,
    table,
)
from reshard.core.plan import parse_size
from reshard.errors import OptionError, listed
from reshard.formats.info import output_format, output_formats
from reshard.naming import parse_version
from reshard.naming.rewards import RewardOptions
from reshard.transfer.cluster.connection import Workers, check_installed, parse_address

# More threads than this only compete for the memory bus.
_MAX_THREADS = 4

#: Other words for dtypes.
DTYPE_ALIASES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

THREADS = Option(
    "threads",
    Integer(1, 1024),
    "How many threads to use; default: one per core, at most 4.",
    group="Output",
    metavar="N",
)
PROGRESS = Option(
    "progress",
    Function(),
    "A function that is called with the stage, the bytes done and the bytes in all.",
    only_python=True,
)

#: The options of `reshard.convert` and `reshard convert`, in the order in which errors name them.
CONVERT = table(
    Option("source", Place(remote=True), "The checkpoint, or a folder above it.", required=True),
    Option("target", Place(remote=True, writes=True), "The output: a new folder.", required=True),
    Option(
        "base",
        Place(remote=True),
        "The Hugging Face model that training started from: a folder, a URL, or a name in the "
        "Hugging Face cache. It defines the names and dtypes of the output's tensors; its "
        "config, tokenizer and other files are copied. Without it, only weights are written.",
        group="Input",
        short="b",
    ),
    TAG,
    PREFIX,
    ROLE,
    Option(
        "to",
        Choice(tuple(output_formats())),
        "The format of the output: hf, a Hugging Face folder; dcp, PyTorch DCP, for FSDP; "
        "deepspeed, a universal checkpoint with the training state; megatron, Megatron-Core's "
        "torch_dist; meta, Meta's own files of Llama 1 to 3.",
        "hf",
        group="Output",
    ),
    Option(
        "dtype",
        DTypeName(CHOICES, DTYPE_ALIASES),
        "The dtype of the output. base: that of each tensor in the base (default with --base); "
        "keep: that of each tensor in the checkpoint (default without --base); otherwise the "
        "dtype of all floating-point tensors.",
        group="Output",
    ),
    Option(
        "masters",
        Flag(),
        "Read the weights of a Megatron checkpoint from the fp32 masters in its optimizer's "
        "state. For DeepSpeed checkpoints this is always so.",
        False,
        group="Input",
    ),
    Option(
        "max_shard_size",
        Size(),
        "The largest size of an output file, e.g. 5GB; default: 5GB for Hugging Face files, 1GB "
        "for others.",
        group="Output",
        metavar="SIZE",
    ),
    Option(
        "names",
        Choice(NAMES),
        "Which names the tensors get. all: the names in the base's files and also those that "
        "loaded models of any transformers version ask for (default with --to dcp, if the "
        "model's config is known); disk: the names in the base's files (the default otherwise); "
        "memory: the names of the loaded model of one transformers version; hub: with --to hf, "
        "the names and layout of the released model, if transformers 5 saved the base in another "
        "layout; torchtitan: with --to dcp, the names of torchtitan's own models, of 0.3 and of "
        "2025.",
        group="Output",
    ),
    Option(
        "transformers_version",
        Parsed(parse_version),
        "A version of transformers, e.g. 4.57. With --names memory: the version that will load "
        "the output; default: the installed one. With --names all: a version whose names must be "
        "included. Otherwise: the version used in training; needed only if an error asks for it.",
        group="Output",
        metavar="V",
    ),
    Option(
        "consumed_samples",
        Integer(0, (1 << 63) - 1),
        "With --to dcp: also write client_state.pt, which LightRFT's load_ckpt needs, with this "
        "number of consumed samples; 0 for a new run.",
        group="Output",
        metavar="N",
        underscored=True,
    ),
    Option(
        "optimizer",
        Flag(),
        "Also write the training state: the optimizer's moments, steps and parameter groups, the "
        "schedule, and the script's own counters. The weights keep the checkpoint's dtype (fp32 "
        "masters stay fp32) and have the names of the loaded model.",
        False,
        group="Training state",
    ),
    Option(
        "layout",
        Choice(LAYOUTS),
        "With --optimizer and --to dcp: which program loads the output. lightrft: LightRFT's "
        "load_ckpt (default); accelerate: accelerate and the HF Trainer; nested: dcp.load of one "
        "nested state dict; torchtitan: torchtitan.",
        group="Training state",
    ),
    Option(
        "hyperparameters",
        Place(),
        "With --optimizer: a JSON file with the hyperparameters of each parameter group, as a "
        "list of objects, if the checkpoint does not contain them (DeepSpeed's elastic "
        "checkpoints).",
        group="Training state",
        metavar="FILE",
    ),
    Option(
        "threads",
        Integer(1, 1024),
        "How many threads to use; default: one per core, at most 4. With --engine ray: how many "
        "pieces to process at a time; default: one per processor of the cluster.",
        group="Output",
        metavar="N",
    ),
    Option(
        "engine",
        Choice(ENGINES),
        "What reads, writes and verifies the bytes. local: threads of this process; ray: the "
        "workers of a Ray cluster, which must see SRC, DST and the base under the same paths.",
        "local",
        group="Output",
    ),
    Option(
        "ray_address",
        Parsed(parse_address),
        "With --engine ray: the cluster's address, HOST:PORT, or auto for the cluster that this "
        "machine is a node of. Default: RAY_ADDRESS; without it, reshard starts a cluster on "
        "this machine for this run.",
        group="Output",
        metavar="ADDRESS",
    ),
    Option(
        "overwrite",
        Flag(),
        "Replace DST if reshard wrote it and nothing in it was added or changed; the old output "
        "is deleted once the new one is complete. reshard never replaces anything else.",
        False,
        group="Output",
    ),
    Option(
        "resume",
        Flag(),
        "Continue an interrupted run of the same command: reshard reads and hashes again what "
        "that run had finished, and reuses it if the hashes match. If this run is interrupted "
        "too, it keeps what it finished. With nothing to continue, it is an ordinary run.",
        False,
        group="Output",
    ),
    Option(
        "verify",
        Flag(no="Do not read the output back and compare it."),
        "Read the output back and compare it.",
        True,
        group="Output",
    ),
    Option(
        "dry_run",
        Flag(),
        "Check and plan everything, but write nothing.",
        False,
        group="Output",
        short="n",
    ),
    PROGRESS,
    Option(
        "model_type",
        Choice(MODEL_TYPES),
        "The kind of model; default: detected from its heads. vision2seq: a model that generates "
        "text, also from images or audio; grm: a generative reward model; srm_vl, srm_al: a scalar "
        "reward model for images or audio; critic: a model with a value head.",
        group="Reward models and critics",
        needs_base=True,
        underscored=True,
    ),
    Option(
        "pooling_method",
        Choice(POOLINGS),
        "Scalar reward models only: how the heads pool. It must agree with the checkpoint.",
        group="Reward models and critics",
        needs_base=True,
        underscored=True,
    ),
    Option(
        "scale_for_train",
        Flag(either=True),
        "Scalar reward models only: whether there is a logit scale. It must agree with the "
        "checkpoint.",
        group="Reward models and critics",
        needs_base=True,
        underscored=True,
    ),
    Option(
        "heads_types",
        Texts(),
        "Scalar reward models only: the names of the heads, in order. They must agree with the "
        "checkpoint.",
        group="Reward models and critics",
        metavar="NAME",
        needs_base=True,
        underscored=True,
    ),
    Option(
        "probing_layer",
        Integer(),
        "Scalar reward models only: the index of the hidden state that the heads read. The "
        "checkpoint does not contain it; reshard records it in reward_config.json. Default: -1, "
        "as in LightRFT.",
        group="Reward models and critics",
        metavar="N",
        needs_base=True,
        underscored=True,
    ),
    Option(
        "value_head",
        Text(),
        "The name of a critic's head, e.g. value_head. reshard detects score and v_head without "
        "it.",
        group="Reward models and critics",
        metavar="NAME",
        needs_base=True,
        underscored=True,
    ),
    Option(
        "srm_format",
        Choice(SRM_FORMATS),
        "The output of a scalar reward model. lightrft: the state dict that LightRFT loads; "
        "split: the backbone, and the heads beside it; both: both.",
        "both",
        group="Reward models and critics",
        needs_base=True,
    ),
    Option(
        "lora",
        Choice(LORA),
        "The output of LoRA adapters. merge: the model with the adapters merged into its weights "
        "(default with --base); adapter: a folder for PEFT; both: both.",
        group="Adapters",
        needs_base=True,
    ),
    Option(
        "lora_alpha",
        Number(),
        "The alpha that the adapters were trained with; a checkpoint does not contain it.",
        group="Adapters",
        metavar="ALPHA",
        needs_base=True,
        underscored=True,
    ),
    Option(
        "adapter_config",
        Place(),
        "The run's adapter_config.json, which states alpha and the other settings of the adapters.",
        group="Adapters",
        needs_base=True,
    ),
    Option(
        "adapter",
        Text(),
        "Which adapter to convert, if there are several.",
        group="Adapters",
        metavar="NAME",
        needs_base=True,
    ),
    Option(
        "exclude_frozen",
        Flag(),
        "Leave out the frozen parameters.",
        False,
        group="What may differ",
    ),
    Option(
        "fill_from_base",
        Flag(),
        "Copy the tensors that the checkpoint lacks from the base.",
        False,
        group="What may differ",
        needs_base=True,
        underscored=True,
    ),
    Option(
        "allow",
        Patterns(),
        "Tensor names that may be missing from the checkpoint, or have no place in the base; `*` "
        "stands for any characters, e.g. 'visual.*'.",
        (),
        group="What may differ",
        metavar="PATTERN",
        needs_base=True,
    ),
    Option(
        "allow_unchanged",
        Flag(),
        "Accept a result in which every tensor equals the base's.",
        False,
        group="What may differ",
        needs_base=True,
    ),
    Option(
        "allow_step_mismatch",
        Flag(),
        "Accept a ZeRO-3 checkpoint whose optimizer is at another step than the model, because "
        "it was restarted.",
        False,
        group="What may differ",
    ),
    Option(
        "strict",
        Codes({code: about for code, about in CODES.items() if not about.by}),
        "Treat every warning as an error; with codes, only the findings with these codes.",
        False,
        group="What may differ",
        metavar="CODE",
    ),
)


class Running(Struct, frozen=True):
    """Whether and how a conversion's plan is carried out; nothing here changes a byte of it."""

    writing: Writing
    dry_run: bool
    allow_unchanged: bool
    strict: bool | tuple[str, ...]


def _shard_size(to: str) -> int:
    """The default of `max_shard_size`, in bytes."""
    return parse_size(output_format(to).max_shard_size)


def parsed(given: Mapping[str, object]) -> tuple[Options, Running]:
    """The options of a conversion, from their keywords. Raises `OptionError`."""
    values = dict(parse(CONVERT, given))
    values["optimizer"] = values["optimizer"] or output_format(values["to"]).needs_state
    _check_target(values)
    _check_files(values)
    _check_state(values)
    if values["base"] is None:
        _check_needs_no_base(values)
    options = Options(
        source=values["source"],
        target=values["target"],
        base=values["base"],
        to=values["to"],
        selection=formats.Selection(
            values["tag"],
            values["prefix"],
            values["allow_step_mismatch"],
            values["role"],
            values["masters"],
        ),
        dtype=_dtype(values["dtype"], values["base"], optimizer=values["optimizer"]),
        max_shard_nbytes=values["max_shard_size"] or _shard_size(values["to"]),
        exclude_frozen=values["exclude_frozen"],
        fill_from_base=values["fill_from_base"],
        allow=values["allow"],
        rewards=RewardChoice(
            values["model_type"],
            RewardOptions(
                values["pooling_method"],
                values["scale_for_train"],
                values["heads_types"] or None,
                values["value_head"],
            ),
            values["probing_layer"],
            values["srm_format"],
        ),
        lora=LoraChoice(
            values["lora"], values["lora_alpha"], values["adapter_config"], values["adapter"]
        ),
        names=values["names"],
        transformers_version=values["transformers_version"],
        consumed_samples=values["consumed_samples"],
        optimizer=values["optimizer"],
        layout=values["layout"] or _layout(values),
        hyperparameters=values["hyperparameters"],
    )
    writing = Writing(
        workers(values["threads"]),
        values["overwrite"],
        values["resume"],
        values["verify"],
        values["progress"],
        _workers(values),
    )
    dry_run, unchanged = values["dry_run"], values["allow_unchanged"]
    return options, Running(writing, dry_run, unchanged, values["strict"])


def _workers(values: Mapping[str, Any]) -> Workers | None:
    """Which cluster carries the conversion out, if one does."""
    address = values["ray_address"]
    if values["engine"] == "local":
        if address is not None:
            raise OptionError(
                "ray_address: it has no effect without --engine ray.",
                hint="Pass --engine ray, or leave out --ray-address.",
                option="ray_address",
            )
        return None
    check_installed()
    return Workers(address, values["threads"])


def _check_target(values: Mapping[str, Any]) -> None:
    """Refuse options that the output format does not support."""
    to = values["to"]
    if values["names"] is not None and output_format(to).naming is not None:
        raise OptionError(
            f"names: --to {to} always uses the names of that trainer.",
            hint="Leave out --names.",
            option="names",
        )
    if values["names"] == "torchtitan" and not output_format(to).names_twice:
        raise OptionError(
            f"names 'torchtitan' needs --to dcp, not --to {to}.",
            hint="Pass --to dcp, or leave out --names.",
            option="names",
        )
    if values["names"] == "all" and not output_format(to).names_twice:
        raise OptionError(
            f"names 'all' gives each tensor several names, which --to {to} cannot store.",
            hint="Leave out --names."
            if values["optimizer"]
            else "Pass --to dcp, or leave out --names.",
            option="names",
        )
    if values["names"] == "hub" and not output_format(to).takes_files:
        raise OptionError(
            f"names 'hub' needs --to hf, not --to {to}.",
            hint="Leave out --names."
            if values["optimizer"]  # which --to hf does not write
            else "Pass --to hf, or leave out --names.",
            option="names",
        )
    if values["consumed_samples"] is not None and not output_format(to).client_state:
        raise OptionError(
            f"consumed_samples: it is written with --to dcp, not with --to {to}.",
            hint="Pass --to dcp, or leave out --consumed-samples.",
            option="consumed_samples",
        )


def _check_files(values: Mapping[str, Any]) -> None:
    """Refuse sizes and dtypes where the output format has its own."""
    to, dtype = values["to"], values["dtype"]
    if output_format(to).file_each and values["max_shard_size"] is not None:
        raise OptionError(
            f"max_shard_size: with --to {to} every tensor has its own file.",
            hint="Leave out --max-shard-size.",
            option="max_shard_size",
        )
    if output_format(to).one_file and values["max_shard_size"] is not None:
        raise OptionError(
            f"max_shard_size: with --to {to} all tensors are one file.",
            hint="Leave out --max-shard-size.",
            option="max_shard_size",
        )
    if output_format(to).full_precision and dtype not in (None, "keep", "float32"):
        raise OptionError(
            f"dtype: --to {to} always writes the full-precision weights that the optimizer "
            "updates.",
            hint="Leave out --dtype.",
            option="dtype",
        )


def _layout(values: Mapping[str, Any]) -> str | None:
    """The default of `layout`."""
    if values["optimizer"] and values["names"] == "torchtitan":
        return "torchtitan"
    layouts = output_format(values["to"]).layouts
    return layouts[0] if values["optimizer"] and layouts else None


def _check_state(values: Mapping[str, Any]) -> None:
    """Refuse training state that the output format cannot hold, and the state's options where it
    is not asked for."""
    to = values["to"]
    info = output_format(to)
    if values["optimizer"] and not info.writes_state:
        able = listed(
            f"--to {name}" for name, other in output_formats().items() if other.writes_state
        )
        raise OptionError(
            f"optimizer: --to {to} cannot store training state.",
            hint=f"Pass {able}, or leave out --optimizer.",
            option="optimizer",
        )
    format_that_holds = "" if info.writes_state else "--to dcp "
    for name in ("layout", "hyperparameters"):
        if values[name] is not None and not values["optimizer"]:
            raise OptionError(
                f"{name}: it has no effect without --optimizer.",
                hint=f"Pass {format_that_holds}--optimizer, or leave out --{name}.",
                option=name,
            )
    if values["layout"] is not None and values["layout"] not in info.layouts:
        raise OptionError(
            f"layout: --to {to} has only one layout.",
            hint="Leave out --layout.",
            option="layout",
        )
    if values["optimizer"] and values["names"] == "all":
        raise OptionError(
            "names 'all' gives a parameter several names, but its optimizer state has only one.",
            hint="Pass --names memory, or leave out --names.",
            option="names",
        )
    if values["names"] == "torchtitan" and values["layout"] not in (None, "torchtitan"):
        raise OptionError(
            f"layout: an optimizer under torchtitan's names is written with --layout torchtitan, "
            f"not {values['layout']}.",
            hint="Pass --layout torchtitan, or leave out --layout.",
            option="layout",
        )


def words(given: Mapping[str, object]) -> list[str]:
    """The command line of options that were given by keyword, but for those at their defaults."""
    line: list[str] = []
    for name, option in CONVERT.items():
        value = given.get(name, option.default)
        if option.only_python or value in (option.default, ()):
            continue
        if isinstance(option.type, Flag):
            line.append(f"--{'' if value else 'no-'}{option.flag}")
        elif isinstance(value, (list, tuple)):
            line += [f"--{option.flag}", *map(str, value)]
        elif value is True:
            line.append(f"--{option.flag}")
        else:
            text = str(value).removeprefix("torch.")
            line += [text] if option.required else [f"--{option.flag}", text]
    return line


def workers(threads: int | None) -> int:
    """How many threads, where the user may have said so."""
    return threads or min(_MAX_THREADS, os.cpu_count() or 1)


def _dtype(choice: str | None, base: Path | None, *, optimizer: bool) -> str:
    if choice == "base" and base is None:
        raise OptionError("dtype 'base' needs a base.", hint="Pass --base.", option="dtype")
    return choice or ("keep" if base is None or optimizer else "base")


def _check_needs_no_base(values: Mapping[str, Any]) -> None:
    """Refuse options that act on a base's names or values where there is none."""
    idle = [
        option
        for name, option in CONVERT.items()
        if option.needs_base
        and values[name] not in (option.default, ())
        # The script's default, which asks for nothing.
        and not (name == "model_type" and values[name] == "vision2seq")
    ]
    if idle:
        flags = ", ".join(f"--{option.flag}" for option in idle)
        raise OptionError(
            f"{flags}: no effect without a base.", hint="Pass --base.", option=idle[0].name
        )
