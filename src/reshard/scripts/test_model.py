"""`test_model`: try a converted model, with LightRFT's option names."""

from __future__ import annotations

import sys

from reshard.cli import run
from reshard.evaluate.command import test_model


def main() -> None:
    """The console command `test_model`."""
    sys.exit(run(test_model))
