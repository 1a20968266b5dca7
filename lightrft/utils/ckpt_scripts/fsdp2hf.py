"""FSDP checkpoint (PyTorch DCP) to Hugging Face: `python fsdp2hf.py --help`."""

from reshard.cli.start import fsdp2hf

if __name__ == "__main__":
    fsdp2hf()
