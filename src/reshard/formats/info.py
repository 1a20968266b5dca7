"""The description of each format, and the table of formats.

No code outside a format's room compares its name: code that needs to know something about a format
reads its `FormatInfo`. The formats that come with reshard stand in `OWN`. Another package adds one
by an entry point of the group `reshard.formats` that leads to a `FormatInfo`:

    [project.entry-points."reshard.formats"]
    npy = "reshard_npy:INFO"
"""

from __future__ import annotations

import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Literal

from msgspec import Struct

from reshard.errors import OptionError, UnsupportedError

_GROUP = "reshard.formats"


class FormatInfo(Struct, frozen=True):
    """A format: what it is called, where its code is, and what its checkpoints have.

    name: what reports and `reshard.json` call it. title: what one is called in a sentence.
    module: the room, imported on first use. advice: how one is converted, in a sentence.
    scripts: LightRFT's scripts that convert it.
    exported: one is a whole model, which trainers also write beside their checkpoints.
    has_roles: one save holds several models, each under a role.
    has_tags: one folder holds several saves, each under a tag.
    finds_model: its reader takes the model's part out of a nested state dict by `prefix` itself.
    masters: whether the optimizer's full-precision weights are read: never, always where they have
    names, or where that is asked for.
    holds_config: the model's config lies beside the weights, and names are those of its files.
    checksums: its files state checksums of the tensors' bytes.
    to: the value of `--to` that writes it; None where it is not written.
    naming: the trainer whose names a model's tensors have there; None: the hub's.
    names_twice: what is written can give the same bytes several names.
    client_state: LightRFT's client_state.pt may lie beside what is written.
    max_shard_size: the default size of a written file.
    takes_files: the base's other files and heads beside the model go along when it is written.
    single: the suffix of single files of it that can be written beside a model; None: none can.
    training_state: one can hold an optimizer's state, which its reader offers.
    writes_state: training state is written in it (`lay_out_state` of its room).
    needs_state: a model alone is not written in it: its training state always goes along.
    full_precision: weights that an optimizer updates are float32 in it, and so are its moments.
    file_each: every tensor is a file of its own, of whatever size.
    one_file: all tensors are one file, of whatever size.
    layouts: the values of `--layout` by which that is written, the default first; empty: there is
    one layout.
    """

    name: str
    title: str
    module: str
    advice: str = "Convert it with: reshard convert SRC DST --base BASE."
    scripts: tuple[str, ...] = ()
    exported: bool = False
    has_roles: bool = False
    has_tags: bool = False
    finds_model: bool = False
    masters: Literal["never", "always", "asked"] = "never"
    holds_config: bool = False
    checksums: bool = False
    to: str | None = None
    naming: str | None = None
    names_twice: bool = False
    client_state: bool = False
    max_shard_size: str = "5GB"
    takes_files: bool = False
    single: str | None = None
    training_state: bool = False
    writes_state: bool = False
    needs_state: bool = False
    full_precision: bool = False
    file_each: bool = False
    one_file: bool = False
    layouts: tuple[str, ...] = ()


#: The formats that come with reshard.
OWN = (
    FormatInfo(
        "dcp",
        "a PyTorch DCP (FSDP) checkpoint",
        "reshard.formats.dcp",
        checksums=True,
        advice="Convert it with fsdp2hf.",
        scripts=("fsdp2hf",),
        finds_model=True,
        to="dcp",
        names_twice=True,
        client_state=True,
        # Small enough that many ranks read different files.
        max_shard_size="1GB",
        training_state=True,
        writes_state=True,
        layouts=("lightrft", "accelerate", "nested", "torchtitan"),
    ),
    FormatInfo(
        "deepspeed",
        "a DeepSpeed checkpoint",
        "reshard.formats.deepspeed",
        checksums=True,
        advice="Convert it with ds2hf.",
        scripts=("ds2hf",),
        has_tags=True,
        masters="always",
        training_state=True,
        to="deepspeed",
        client_state=True,
        writes_state=True,
        needs_state=True,
        full_precision=True,
        file_each=True,
    ),
    FormatInfo(
        "huggingface",
        "a Hugging Face model",
        "reshard.formats.huggingface",
        advice="Convert it with hf2fsdp.",
        scripts=("hf2fsdp",),
        exported=True,
        holds_config=True,
        to="hf",
        takes_files=True,
        single=".safetensors",
        training_state=True,
    ),
    FormatInfo(
        "megatron",
        "a checkpoint of Megatron-Core",
        "reshard.formats.megatron",
        checksums=True,
        has_roles=True,
        masters="asked",
        training_state=True,
        to="megatron",
        naming="megatron",
        max_shard_size="1GB",
    ),
    FormatInfo(
        "meta",
        "a checkpoint of Meta's Llama",
        "reshard.formats.meta",
        exported=True,
        checksums=True,
        to="meta",
        naming="meta",
        one_file=True,
    ),
    FormatInfo(
        "ranks",
        "an FSDP checkpoint of one file a rank",
        "reshard.formats.rank_files",
        checksums=True,
        advice="Convert it with fsdp2hf.",
        scripts=("fsdp2hf",),
        has_roles=True,
        training_state=True,
    ),
    FormatInfo(
        "torch",
        "a torch.save file",
        "reshard.formats.torch_state_dict",
        checksums=True,
        scripts=("ds2hf", "fsdp2hf"),
        exported=True,
        holds_config=True,
        single=".bin",
        training_state=True,
    ),
)


@cache
def every() -> dict[str, FormatInfo]:
    """All formats by name: reshard's own, and those of installed packages.

    Raises `UnsupportedError` where a package's entry point leads nowhere, or to a name in use.
    """
    formats = {info.name: info for info in OWN}
    for value in _registered():
        module, _, attribute = value.partition(":")
        try:
            info = getattr(import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise UnsupportedError(
                f"the format that an installed package registers as {value!r} cannot be loaded: "
                f"{error}.",
                hint="Install that package again, or remove it.",
            ) from None
        if not isinstance(info, FormatInfo) or info.name in formats:
            raise UnsupportedError(
                f"{value!r}, which an installed package registers, is not a format with a name of "
                "its own.",
                hint="Remove that package.",
            )
        formats[info.name] = info
    return formats


def _registered() -> list[str]:
    """The values of the group's entry points.

    The folders are read here: importing `importlib.metadata` takes 30 ms, this 2 ms.
    """
    values: dict[str, None] = {}
    for folder in dict.fromkeys(sys.path):
        for file in Path(folder or ".").glob("*.dist-info/entry_points.txt"):
            text = file.read_text(encoding="utf-8", errors="replace")
            _, found, section = text.partition(f"[{_GROUP}]")
            for line in section.partition("\n[")[0].splitlines() if found else ():
                name, is_entry, value = line.partition("=")
                if is_entry and not name.startswith(("#", ";")):
                    values[value.split("[")[0].strip()] = None
    return list(values)


def named(name: str) -> FormatInfo:
    """What the format of that name says of itself."""
    return every()[name]


def output_formats() -> dict[str, FormatInfo]:
    """The formats that can be written, by the values of `--to`; the default first."""
    found = [info for info in every().values() if info.to is not None]
    found.sort(key=lambda info: info.to != "hf")
    return {info.to or "": info for info in found}


def output_format(to: str) -> FormatInfo:
    """The format that a value of `--to` names. Raises `OptionError` where there is none."""
    found = output_formats()
    if to not in found:
        raise OptionError(
            f"{to!r} is not an output format.", hint=f"Use one of {', '.join(found)}."
        )
    return found[to]


def single_for(file: str) -> FormatInfo:
    """The format of single files that are called like this one, beside a model."""
    return next(info for info in every().values() if info.single and file.endswith(info.single))
