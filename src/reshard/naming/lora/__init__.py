"""Adapters of PEFT: where they are in a state dict, how they scale, and their own folder."""
