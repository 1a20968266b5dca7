"""Try a converted Hugging Face model: `python test_model.py --help`."""

from reshard.cli.start import test_model

if __name__ == "__main__":
    test_model()
