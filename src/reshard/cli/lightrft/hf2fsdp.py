"""`hf2fsdp`: Hugging Face safetensors to a PyTorch DCP checkpoint, which FSDP loads."""

from __future__ import annotations

from typing import Any

import click

from reshard.cli.app import HELP, end, run
from reshard.cli.flags import Command, debug, flag, type_of
from reshard.cli.interrupts import writes
from reshard.cli.lightrft import carry_out
from reshard.conversion.declared import CONVERT


@click.command(cls=Command, context_settings=HELP)
@click.option("--hf_checkpoint", "source", type=type_of(CONVERT["source"]), required=True,
              help="The Hugging Face model folder.")  # fmt: skip
@click.option("--output", "target", type=type_of(CONVERT["target"]), required=True,
              help="A new folder; it appears complete or not at all.")  # fmt: skip
@flag(CONVERT["names"])
@flag(CONVERT["transformers_version"])
@flag(CONVERT["consumed_samples"])
@flag(CONVERT["overwrite"])
@flag(CONVERT["resume"])
@debug
@writes("target")
def command(**given: Any) -> None:
    """Convert a Hugging Face model to a PyTorch DCP checkpoint.

    `torch.distributed.checkpoint.load` loads it into plain tensors, FSDP1 and FSDP2 models, at any
    world size. Tensors keep their dtypes.
    """
    carry_out("hf2fsdp", to="dcp", **given)


def main() -> None:
    """The console command `hf2fsdp`."""
    end(run(command))
