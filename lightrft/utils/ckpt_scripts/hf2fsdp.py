"""Hugging Face safetensors to PyTorch DCP: `python hf2fsdp.py --help`."""

from reshard.cli.start import hf2fsdp

if __name__ == "__main__":
    hf2fsdp()
