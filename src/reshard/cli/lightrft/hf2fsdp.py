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
@click.option("--names", type=click.Choice(NAMES),
              help="all: each tensor by its name on disk and by those that live modules of any "
                   "transformers version ask for (default, with a config.json); disk: as in the "
                   "files; memory: as the live module of one version has them.")  # fmt: skip
@click.option("--transformers-version", metavar="V",
              help="With --names memory: whose live module (default: the installed one); "
                   "with all: a version that must be among them.")  # fmt: skip
@click.option("--consumed-samples", "--consumed_samples", type=click.IntRange(min=0), metavar="N",
              help="Write client_state.pt, which LightRFT's load_ckpt needs: how many samples the "
                   "run has used up; 0 for a new one.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace an output that reshard wrote.")
@debug
@writes("target")
def command(
    hf_checkpoint: Path,
    target: Path,
    names: str | None,
    transformers_version: str | None,
    consumed_samples: int | None,
    overwrite: bool,
) -> None:
    """Convert a Hugging Face model to a PyTorch DCP checkpoint.

    `torch.distributed.checkpoint.load` reads it into plain tensors, FSDP1 and FSDP2 models, at any
    world size. Dtypes stay as they stand in the safetensors files.
    """
    from reshard.cli.commands import show_report
    from reshard.conversion.convert import convert

    expect(hf_checkpoint, "huggingface")
    with output.progress_bar() as progress:
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
