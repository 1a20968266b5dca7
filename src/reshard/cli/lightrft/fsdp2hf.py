"""`fsdp2hf`: an FSDP checkpoint (PyTorch DCP) to a Hugging Face folder."""

from __future__ import annotations

from typing import Any

import click

from reshard.cli.app import HELP, end, run
from reshard.cli.flags import Command, FolderOrFile, debug, flag
from reshard.cli.interrupts import writes
from reshard.cli.lightrft import carry_out
from reshard.conversion.declared import CONVERT
from reshard.core.options import Place

_PATH = FolderOrFile(place=Place(remote=True))
_OUTPUT = FolderOrFile(place=Place(remote=True, writes=True))


@click.command(cls=Command, context_settings=HELP)
@click.option("--hf_base", "base", type=_PATH, required=True,
              help="The Hugging Face model that training started from.")  # fmt: skip
@click.option("--checkpoint_dir", "source", type=_PATH, required=True,
              help="The folder with .metadata and .distcp files, or with rank files.")  # fmt: skip
@click.option("--output_dir", "target", type=_OUTPUT, required=True,
              help="A new folder; it appears complete or not at all.")  # fmt: skip
@flag(CONVERT["prefix"])
@flag(CONVERT["role"])
@flag(CONVERT["fill_from_base"])
@flag(CONVERT["probing_layer"])
@flag(CONVERT["heads_types"])
@flag(CONVERT["value_head"])
@flag(CONVERT["lora_alpha"])
@flag(CONVERT["overwrite"])
@flag(CONVERT["resume"])
@debug
@writes("target")
def command(**given: Any) -> None:
    """Convert an FSDP checkpoint (PyTorch DCP, or files of ranks) to a Hugging Face folder.

    Names, dtypes and all files but the weights are those of the base model, be it a language or a
    vision-language model.
    """
    carry_out("fsdp2hf", allow_unchanged=True, **given)


def main() -> None:
    """The console command `fsdp2hf`."""
    end(run(command))
