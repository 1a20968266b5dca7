"""Names as data: the names of a checkpoint's tensors, and the names that its users need.

The base model's own safetensors headers are the contract. This room finds the map onto them:
wrappers' prefixes, the layouts of model families (`families.py`, the table to extend), tied heads,
adapters, reward heads. It opens no file, builds no model and imports no framework.

families, ties, architectures    **the tables to extend**: layouts, tied tensors, released tensors
layouts, patterns, assemble      how a layout names, stacks and orients tensors
readings, beginnings, scanning   what many names are in a layout; how they begin, end, contain
schema, fields, backbone         the base as its files state it; fields and classes of its config
search, ways, wider, judge       find the prefix and the layouts that fit, and judge each tensor
fit, steps, tied_tensors         the fit, step by step
name_map, matching               its results: the map, and what differs
mismatch, wrong_base             the error for a source that does not fit
structure, sisters, partners     what doctor and a plan check: layers, head, embedding
memory, answering, released      names in loaded models, and the layout of releases
lora/, quantised/                adapters; codes and scales
rewards, value_heads             LightRFT's reward models; critics
autoep, flat, order, part        AutoEP's experts; flat parameters; lists without names; `--prefix`
pipeline                         numbered layers of a pipeline
titan, titan_into, meta          torchtitan's and Meta's names, both ways
megatron, megatron_into          Megatron-Core's names, both ways; megatron_families, megatron_args
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
