"""`python -m reshard` is the `reshard` command."""

from reshard.cli.app import main

main()
