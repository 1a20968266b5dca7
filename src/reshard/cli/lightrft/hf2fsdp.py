"""`hf2fsdp`: Hugging Face safetensors to a PyTorch DCP checkpoint, which FSDP loads."""

from __future__ import annotations

from pathlib import Path

import click

from reshard.cli.app import HELP, end, run
from reshard.cli.flags import Command, FolderOrFile, debug, flag
from reshard.cli.interrupts import writes
from reshard.cli.lightrft import expect
from reshard.cli.progress import shown_progress
from reshard.conversion.declared import CONVERT
from reshard.conversion.options import Names

_PATH = FolderOrFile()


@click.command(cls=Command, context_settings=HELP)
@click.option("--hf_checkpoint", type=_PATH, required=True,
              help="The Hugging Face model folder.")  # fmt: skip
@click.option("--output", "target", type=_PATH, required=True,
              help="A new folder; it appears whole, or not at all.")  # fmt: skip
@flag(CONVERT["names"])
@flag(CONVERT["transformers_version"])
@flag(CONVERT["consumed_samples"])
@flag(CONVERT["overwrite"])
@debug
@writes("target")
def command(
    hf_checkpoint: Path,
    target: Path,
    names: Names | None,
    transformers_version: str | None,
    consumed_samples: int | None,
    overwrite: bool,
) -> None:
    """Convert a Hugging Face model to a PyTorch DCP checkpoint.

    `torch.distributed.checkpoint.load` reads it into plain tensors, FSDP1 and FSDP2 models, at any
    world size. Dtypes are kept.
    """
    from reshard.cli.commands import show_report
    from reshard.conversion.convert import convert

    expect(hf_checkpoint, "hf2fsdp")
    with shown_progress() as progress:
        report = convert(
            hf_checkpoint,
            target,
            to="dcp",
            names=names,
            transformers_version=transformers_version,
            consumed_samples=consumed_samples,
            overwrite=overwrite,
            progress=progress,
        )
    show_report(report)


def main() -> None:
    """The console command `hf2fsdp`."""
    end(run(command))
