"""DeepSpeed checkpoint to Hugging Face: `python ds2hf.py --help`."""

from reshard.cli.lightrft.ds2hf import main

if __name__ == "__main__":
    main()
