"""`fsdp2hf`: an FSDP checkpoint (PyTorch DCP) to a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import click

from reshard.cli.app import HELP, end, run
from reshard.cli.flags import Command, FolderOrFile, debug, flag
from reshard.cli.interrupts import writes
from reshard.cli.lightrft import expect
from reshard.cli.progress import shown_progress
from reshard.conversion.declared import CONVERT

_PATH = FolderOrFile()


@click.command(cls=Command, context_settings=HELP)
@click.option("--hf_base", type=_PATH, required=True,
              help="The Hugging Face model that training started from.")  # fmt: skip
@click.option("--checkpoint_dir", type=_PATH, required=True,
              help="The folder with .metadata and .distcp files, or with rank files.")  # fmt: skip
@click.option("--output_dir", type=_PATH, required=True,
              help="A new folder; it appears whole, or not at all.")  # fmt: skip
@flag(CONVERT["prefix"])
@flag(CONVERT["role"])
@flag(CONVERT["fill_from_base"])
@flag(CONVERT["probing_layer"])
@flag(CONVERT["heads_types"])
@flag(CONVERT["value_head"])
@flag(CONVERT["lora_alpha"])
@flag(CONVERT["overwrite"])
@debug
@writes("output_dir")
def command(
    hf_base: Path,
    checkpoint_dir: Path,
    output_dir: Path,
    prefix: str | None,
    role: str | None,
    fill_from_base: bool,
    probing_layer: int | None,
    heads_types: tuple[str, ...],
    value_head: str | None,
    lora_alpha: float | None,
    overwrite: bool,
) -> None:
    """Convert an FSDP checkpoint (PyTorch DCP, or files of ranks) to a Hugging Face folder.

    Names, dtypes and all files but the weights are those of the base model, be it a language or a
    vision-language model.
    """
    from reshard.cli.commands import show_report
    from reshard.conversion.convert import convert

    expect(checkpoint_dir, "fsdp2hf")
    with shown_progress() as progress:
        report = convert(
            checkpoint_dir,
            output_dir,
            base=hf_base,
            prefix=prefix,
            role=role,
            fill_from_base=fill_from_base,
            probing_layer=probing_layer,
            heads_types=heads_types,
            value_head=value_head,
            lora_alpha=lora_alpha,
            allow_unchanged=True,
            overwrite=overwrite,
            progress=progress,
        )
    show_report(report, hf_base)


def main() -> None:
    """The console command `fsdp2hf`."""
    end(run(command))
