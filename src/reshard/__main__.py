"""`python -m reshard` is the `reshard` command."""

from reshard.cli.start import reshard

reshard()
