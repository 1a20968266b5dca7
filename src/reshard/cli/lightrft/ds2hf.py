"""`ds2hf`: a DeepSpeed checkpoint to a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import click
from click.core import ParameterSource

from reshard.cli import output
from reshard.cli.app import HELP, end, run
from reshard.cli.flags import FolderOrFile, SeveralValues, debug, option
from reshard.cli.interrupts import writes
from reshard.cli.lightrft import expect
from reshard.conversion.options import MODEL_TYPES, POOLINGS

_PATH = FolderOrFile()


@click.command(cls=SeveralValues, context_settings=HELP)
@click.option("--checkpoint_dir", type=_PATH, required=True,
              help="The folder with `latest` and the tag folders, or a tag folder.")  # fmt: skip
@click.option("--output_dir", type=_PATH, required=True,
              help="A new folder; it appears whole, or not at all.")  # fmt: skip
@click.option("--hf_base", type=_PATH, required=True,
              help="The Hugging Face model that training started from.")  # fmt: skip
@click.option("--tag", "-t", help="Which save, e.g. global_step1; default: `latest`.")
@click.option("--exclude_frozen_parameters", is_flag=True, help="Leave out frozen parameters.")
@option("fill_from_base", is_flag=True,
        help="Copy from the base what the checkpoint does not hold.")  # fmt: skip
@option("model_type", type=click.Choice(MODEL_TYPES), default="vision2seq", show_default=True,
        help="vision2seq: language, vision-language and audio-language models; grm: generative, "
             "srm: scalar reward models.")  # fmt: skip
@option("pooling_method", type=click.Choice(POOLINGS), default="attn", show_default=True,
        help="Scalar reward models: how the heads pool.")  # fmt: skip
@option("scale_for_train", is_flag=True, help="Scalar reward models: with a logit scale.")
@option("probing_layer", type=int, show_default="-1",
        help="Scalar reward models: the hidden state that the heads read.")  # fmt: skip
@option("heads_types", multiple=True, default=("preference",), metavar="NAME...",
        help="Scalar reward models: the heads; default: preference.")  # fmt: skip
@option("value_head", metavar="NAME",
        help="Critics: the head, e.g. value_head; score and v_head are found.")  # fmt: skip
@click.option("--lora-alpha", type=float,
              help="The alpha of LoRA adapters, which a checkpoint does not hold.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace an output that reshard wrote.")
@debug
@writes("output_dir")
def command(
    checkpoint_dir: Path,
    output_dir: Path,
    hf_base: Path,
    tag: str | None,
    exclude_frozen_parameters: bool,
    fill_from_base: bool,
    model_type: str,
    pooling_method: str,
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
    expect(checkpoint_dir, "deepspeed", "torch")
    with output.progress_bar() as progress:
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
    show_report(report)


def main() -> None:
    """The console command `ds2hf`."""
    end(run(command))
