"""`fsdp2hf`: an FSDP checkpoint (PyTorch DCP) to a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import click

from reshard.cli import output
from reshard.cli.app import HELP, end, run
from reshard.cli.flags import FolderOrFile, SeveralValues, debug, option
from reshard.cli.interrupts import writes
from reshard.cli.lightrft import expect

_PATH = FolderOrFile()


@click.command(cls=SeveralValues, context_settings=HELP)
@click.option("--hf_base", type=_PATH, required=True,
              help="The Hugging Face model that training started from.")  # fmt: skip
@click.option("--checkpoint_dir", type=_PATH, required=True,
              help="The folder with .metadata and the .distcp files.")  # fmt: skip
@click.option("--output_dir", type=_PATH, required=True,
              help="A new folder; it appears whole, or not at all.")  # fmt: skip
@click.option("--prefix", help="The model's part of a nested state dict; default: found by itself.")
@option("fill_from_base", is_flag=True,
        help="Copy from the base what the checkpoint does not hold.")  # fmt: skip
@option("probing_layer", type=int, show_default="-1",
        help="Scalar reward models: the hidden state that the heads read.")  # fmt: skip
@option("heads_types", multiple=True, metavar="NAME...",
        help="Scalar reward models: the heads, checked, and their order.")  # fmt: skip
@option("value_head", metavar="NAME",
        help="Critics: the head, e.g. value_head; score and v_head are found.")  # fmt: skip
@click.option("--lora-alpha", type=float,
              help="The alpha of LoRA adapters, which a checkpoint does not hold.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace an output that reshard wrote.")
@debug
@writes("output_dir")
def command(
    hf_base: Path,
    checkpoint_dir: Path,
    output_dir: Path,
    prefix: str | None,
    fill_from_base: bool,
    probing_layer: int | None,
    heads_types: tuple[str, ...],
    value_head: str | None,
    lora_alpha: float | None,
    overwrite: bool,
) -> None:
    """Convert an FSDP checkpoint (PyTorch DCP) to a Hugging Face folder.

    Names, dtypes and all files but the weights are those of the base model, be it a language or a
    vision-language model.
    """
    from reshard.cli.commands import show_report
    from reshard.conversion.convert import convert

    expect(checkpoint_dir, "dcp", "torch")
    with output.progress_bar() as progress:
        report = convert(
            checkpoint_dir,
            output_dir,
            base=hf_base,
            prefix=prefix,
            fill_from_base=fill_from_base,
            probing_layer=probing_layer,
            heads_types=heads_types,
            value_head=value_head,
            lora_alpha=lora_alpha,
            allow_unchanged=True,
            overwrite=overwrite,
            progress=progress,
        )
    show_report(report)


def main() -> None:
    """The console command `fsdp2hf`."""
    end(run(command))
