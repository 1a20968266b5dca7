"""`ds2hf`: a DeepSpeed checkpoint to a Hugging Face folder."""

from __future__ import annotations

from typing import Any

import click
from click.core import ParameterSource

from reshard.cli.app import HELP, end, run
from reshard.cli.flags import Command, debug, flag, option, type_of
from reshard.cli.interrupts import writes
from reshard.cli.lightrft import carry_out
from reshard.conversion.declared import CONVERT
from reshard.naming.rewards import ModelType


@click.command(cls=Command, context_settings=HELP)
@click.option("--checkpoint_dir", "source", type=type_of(CONVERT["source"]), required=True,
              help="The folder with `latest` and the tag folders, or one tag folder.")  # fmt: skip
@click.option("--output_dir", "target", type=type_of(CONVERT["target"]), required=True,
              help="A new folder; it appears complete or not at all.")  # fmt: skip
@click.option("--hf_base", "base", type=type_of(CONVERT["base"]), required=True,
              help="The Hugging Face model that training started from.")  # fmt: skip
@click.option("--tag", "-t", help="Which save, e.g. global_step1; default: `latest`.")
@click.option("--exclude_frozen_parameters", "exclude_frozen", is_flag=True,
              help="Leave out the frozen parameters.")  # fmt: skip
@flag(CONVERT["fill_from_base"])
@flag(CONVERT["model_type"], default="vision2seq", show_default=True)
@flag(CONVERT["pooling_method"], default="attn", show_default=True)
@option("scale_for_train", is_flag=True, help="Scalar reward models only: there is a logit scale.")
@flag(CONVERT["probing_layer"])
@flag(CONVERT["heads_types"], default=("preference",), show_default="preference")
@flag(CONVERT["value_head"])
@flag(CONVERT["lora_alpha"])
@flag(CONVERT["overwrite"])
@flag(CONVERT["resume"])
@debug
@writes("target")
def command(model_type: ModelType, value_head: str | None, **given: Any) -> None:
    """Convert a DeepSpeed checkpoint (no ZeRO, ZeRO-1, 2 or 3) to a Hugging Face folder."""
    said = click.get_current_context().get_parameter_source("model_type")
    if value_head is not None and said is ParameterSource.DEFAULT:
        model_type = "critic"
    given |= {"model_type": model_type, "value_head": value_head}
    carry_out("ds2hf", allow_unchanged=True, **given)


def main() -> None:
    """The console command `ds2hf`."""
    end(run(command))
