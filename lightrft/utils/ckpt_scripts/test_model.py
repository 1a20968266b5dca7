"""Try a converted Hugging Face model: `python test_model.py --help`."""

from reshard.cli.lightrft.test_model import main

if __name__ == "__main__":
    main()
