"""`test_model`: try a converted model."""

from __future__ import annotations

from typing import Any

import click

from reshard.cli.app import HELP, end, run
from reshard.cli.flags import Command, FolderOrFile, option
from reshard.cli.try_ import run_command, shared_options


@click.command("test_model", cls=Command, context_settings=HELP)
@option("model_path", "model", type=FolderOrFile(), required=True,
        help="The converted model's folder.")  # fmt: skip
@shared_options
def command(**given: Any) -> int:
    """Run a converted model: show its answers, and check its speed, health and likeness to another.

    The report goes to a JSON file. The exit code is 0 only if the model loaded, every prompt was
    answered, and no finding is an error.
    """
    return run_command(**given)


def main() -> None:
    """The console command `test_model`."""
    end(run(command))
