"""The version of reshard, read by the build and recorded in every `reshard.json`."""

__version__ = "0.1.0"
