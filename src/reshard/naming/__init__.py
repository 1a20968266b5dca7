"""Names as data: the names of a checkpoint's tensors, and the names that its users need.

The base model's own safetensors headers are the contract. This room finds the map onto them:
wrappers' prefixes, the layouts of model families (`families.py`, the table to extend), tied heads,
adapters, reward heads. It opens no file, builds no model and imports no framework.
"""

from __future__ import annotations

from reshard.naming.fit import fit
from reshard.naming.judge import FitOptions
from reshard.naming.layouts import parse_version
from reshard.naming.matching import Matching, Resize
from reshard.naming.memory import NEWEST, memory_outputs, to_memory, was_read
from reshard.naming.name_map import NameMap, Translation, apply, identity, translation
from reshard.naming.schema import Schema

__all__ = [
    "NEWEST",
    "FitOptions",
    "Matching",
    "NameMap",
    "Resize",
    "Schema",
    "Translation",
    "apply",
    "fit",
    "identity",
    "memory_outputs",
    "parse_version",
    "to_memory",
    "translation",
    "was_read",
]
