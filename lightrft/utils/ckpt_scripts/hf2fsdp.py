"""Hugging Face safetensors to PyTorch DCP: `python hf2fsdp.py --help`."""

from reshard.cli.lightrft.hf2fsdp import main

if __name__ == "__main__":
    main()
