"""`ds2hf`: a DeepSpeed checkpoint to a Hugging Face folder."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from reshard import output
from reshard.cli import HELP, run

_PATH = click.Path(path_type=Path)


@click.command(context_settings=HELP)
@click.option("--checkpoint_dir", type=_PATH, required=True,
              help="The folder with `latest` and the tag folders, or a tag folder.")  # fmt: skip
@click.option("--output_dir", type=_PATH, required=True)
@click.option("--hf_base", type=_PATH, required=True,
              help="The Hugging Face model that training started from.")  # fmt: skip
@click.option("--tag", "-t", help="Which save, e.g. global_step1; default: `latest`.")
@click.option("--exclude_frozen_parameters", is_flag=True, help="Leave out frozen parameters.")
@click.option("--overwrite", is_flag=True, help="Replace an output that exists.")
@click.option("--debug", "-d", is_flag=True, help="Show the traceback of an error.")
def command(
    checkpoint_dir: Path,
    output_dir: Path,
    hf_base: Path,
    tag: str | None,
    exclude_frozen_parameters: bool,
    overwrite: bool,
    debug: bool,
) -> None:
    """Convert a DeepSpeed checkpoint (no ZeRO, ZeRO-1, 2 or 3) to a Hugging Face folder."""
    from reshard.commands import show_report
    from reshard.conversion import convert

    with output.progress_bar() as progress:
        report = convert(
            checkpoint_dir,
            output_dir,
            base=hf_base,
            tag=tag,
            exclude_frozen=exclude_frozen_parameters,
            allow_unchanged=True,
            overwrite=overwrite,
            progress=progress,
        )
    show_report(report)


def main() -> None:
    """The console command `ds2hf`."""
    sys.exit(run(command))
