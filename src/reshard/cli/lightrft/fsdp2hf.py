"""`fsdp2hf`: an FSDP checkpoint (PyTorch DCP) to a Hugging Face folder."""

from __future__ import annotations

from typing import Any

import click

from reshard.cli.app import HELP, end, run
from reshard.cli.flags import Command, debug, flag, type_of
from reshard.cli.interrupts import writes
from reshard.cli.lightrft import carry_out
from reshard.conversion.declared import CONVERT


@click.command(cls=Command, context_settings=HELP)
@click.option("--hf_base", "base", type=type_of(CONVERT["base"]), required=True,
              help="The Hugging Face model that training started from.")  # fmt: skip
@click.option("--checkpoint_dir", "source", type=type_of(CONVERT["source"]), required=True,
              help="The folder with .metadata and .distcp files, or with rank files.")  # fmt: skip
@click.option("--output_dir", "target", type=type_of(CONVERT["target"]), required=True,
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
    """Convert an FSDP checkpoint (PyTorch DCP, or one file per rank) to a Hugging Face folder.

    Names, dtypes and all files but the weights come from the base, which may be a language or a
    vision-language model.
    """
    carry_out("fsdp2hf", allow_unchanged=True, **given)


def main() -> None:
    """The console command `fsdp2hf`."""
    end(run(command))
