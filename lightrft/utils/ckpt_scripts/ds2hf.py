"""DeepSpeed checkpoint to Hugging Face: `python ds2hf.py --help`."""

from reshard.cli.start import ds2hf

if __name__ == "__main__":
    ds2hf()
