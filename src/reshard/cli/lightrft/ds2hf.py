"""`ds2hf`: a DeepSpeed checkpoint to a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import click
from click.core import ParameterSource

from reshard.cli.app import HELP, end, run
from reshard.cli.flags import Command, FolderOrFile, debug, flag, option
from reshard.cli.interrupts import writes
from reshard.cli.lightrft import expect
from reshard.cli.progress import shown_progress
from reshard.conversion.declared import CONVERT
from reshard.naming.rewards import ModelType, Pooling

_PATH = FolderOrFile()


@click.command(cls=Command, context_settings=HELP)
@click.option("--checkpoint_dir", type=_PATH, required=True,
              help="The folder with `latest` and the tag folders, or a tag folder.")  # fmt: skip
@click.option("--output_dir", type=_PATH, required=True,
              help="A new folder; it appears whole, or not at all.")  # fmt: skip
@click.option("--hf_base", type=_PATH, required=True,
              help="The Hugging Face model that training started from.")  # fmt: skip
@click.option("--tag", "-t", help="Which save, e.g. global_step1; default: `latest`.")
@click.option("--exclude_frozen_parameters", is_flag=True, help="Leave out frozen parameters.")
@flag(CONVERT["fill_from_base"])
@flag(CONVERT["model_type"], default="vision2seq", show_default=True)
@flag(CONVERT["pooling_method"], default="attn", show_default=True)
@option("scale_for_train", is_flag=True, help="Scalar reward models: with a logit scale.")
@flag(CONVERT["probing_layer"])
@flag(CONVERT["heads_types"], default=("preference",), show_default="preference")
@flag(CONVERT["value_head"])
@flag(CONVERT["lora_alpha"])
@flag(CONVERT["overwrite"])
@debug
@writes("output_dir")
def command(
    checkpoint_dir: Path,
    output_dir: Path,
    hf_base: Path,
    tag: str | None,
    exclude_frozen_parameters: bool,
    fill_from_base: bool,
    model_type: ModelType,
    pooling_method: Pooling,
    scale_for_train: bool,
    probing_layer: int | None,
    heads_types: tuple[str, ...],
    value_head: str | None,
    lora_alpha: float | None,
    overwrite: bool,
) -> None:
    """Convert a DeepSpeed checkpoint (no ZeRO, ZeRO-1, 2 or 3) to a Hugging Face folder."""
    from reshard.cli.commands import show_report
    from reshard.conversion.convert import convert

    said = click.get_current_context().get_parameter_source("model_type")
    if value_head is not None and said is ParameterSource.DEFAULT:
        model_type = "critic"
    expect(checkpoint_dir, "ds2hf")
    with shown_progress() as progress:
        report = convert(
            checkpoint_dir,
            output_dir,
            base=hf_base,
            tag=tag,
            exclude_frozen=exclude_frozen_parameters,
            fill_from_base=fill_from_base,
            model_type=model_type,
            pooling_method=pooling_method,
            scale_for_train=scale_for_train,
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
    """The console command `ds2hf`."""
    end(run(command))
