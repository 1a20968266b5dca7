"""`hf2fsdp`: Hugging Face safetensors to a PyTorch DCP checkpoint, which FSDP loads."""

from __future__ import annotations

from pathlib import Path

import click

from reshard.cli import output
from reshard.cli.app import HELP, end, run
from reshard.cli.flags import FolderOrFile, debug
from reshard.cli.interrupts import writes
from reshard.cli.lightrft import expect
from reshard.conversion.options import NAMES

_PATH = FolderOrFile()


@click.command(context_settings=HELP)
@click.option("--hf_checkpoint", type=_PATH, required=True,
              help="The Hugging Face model folder.")  # fmt: skip
@click.option("--output", "target", type=_PATH, required=True,
              help="A new folder; it appears whole, or not at all.")  # fmt: skip
@click.option("--names", type=click.Choice(NAMES), default="disk", show_default=True,
              help="memory: as a live module names its tensors, for dcp.load.")  # fmt: skip
@click.option("--transformers-version", metavar="V",
              help="Whose live module; default: the installed one.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace an output that reshard wrote.")
@debug
@writes("target")
def command(
    hf_checkpoint: Path,
    target: Path,
    names: str,
    transformers_version: str | None,
    overwrite: bool,
) -> None:
    """Convert a Hugging Face model to a PyTorch DCP checkpoint.

    `torch.distributed.checkpoint.load` reads it into plain tensors, FSDP1 and FSDP2 models, at any
    world size. Names and dtypes stay as they stand in the safetensors files.
    """
    from reshard.cli.commands import show_report
    from reshard.conversion.convert import convert

    expect(hf_checkpoint, "hf2fsdp")
    with output.progress_bar() as progress:
        report = convert(
            hf_checkpoint,
            target,
            to="dcp",
            names=names,
            transformers_version=transformers_version,
            overwrite=overwrite,
            progress=progress,
        )
    show_report(report)


def main() -> None:
    """The console command `hf2fsdp`."""
    end(run(command))
