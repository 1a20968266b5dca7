"""`python -m reshard` is the `reshard` command."""

from reshard.cli.start import reshard

if __name__ == "__main__":
    reshard()
