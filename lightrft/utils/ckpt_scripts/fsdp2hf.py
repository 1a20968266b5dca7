"""FSDP checkpoint (PyTorch DCP) to Hugging Face: `python fsdp2hf.py --help`."""

from reshard.cli.lightrft.fsdp2hf import main

if __name__ == "__main__":
    main()
