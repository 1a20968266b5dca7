"""The base model as its own files state it: names, shapes, dtypes and config."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any

from msgspec import Struct, field

from reshard.naming.families import FAMILIES, PLAIN
from reshard.naming.layouts import Family, View
from reshard.tensors import TensorSpec


class Schema(Struct, frozen=True):
    """What the output must hold: `specs` by name, as the base's safetensors headers state them.

    `config` is the parsed `config.json`, empty where there is none.
    """

    specs: Mapping[str, TensorSpec]
    config: Mapping[str, Any] = field(default_factory=dict)


def views(config: Mapping[str, Any], *, guess: bool = True) -> tuple[View, ...]:
    """The layouts that a model of this config may be met in, the hub's first.

    A model type without a family has all families' layouts tried on it, for names and shapes to
    decide; without `guess` it has the hub's names only.
    """
    text = family(text_config(config).get("model_type"))
    inner = PLAIN.layouts[:1] if text is None else text.layouts
    known = family(config.get("model_type"))
    guesses = (PLAIN, *FAMILIES) if guess else (PLAIN,)
    outer = guesses if known is None else (known,)
    layouts = [layout for candidate in outer for layout in candidate.layouts]
    return tuple(View(pair) for pair in product(layouts, inner))


def family(model_type: object) -> Family | None:
    """The family of a model type, or None."""
    for candidate in FAMILIES:
        if model_type in candidate.model_types:
            return candidate
    return None


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the language model inside a composite model; empty where there is none."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else {}


def says_tied(config: Mapping[str, Any]) -> bool:
    """Whether the config states, at either level, that head and embedding are one tensor.

    transformers 4 reads the language model's own config, transformers 5 the top level.
    """
    return any(level.get("tie_word_embeddings") is True for level in levels(config))


def says_untied(config: Mapping[str, Any]) -> bool:
    """Whether the config states that they are two, and nowhere that they are one."""
    stated = [level.get("tie_word_embeddings") for level in levels(config)]
    return False in stated and True not in stated


def levels(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """The configs that describe the language model: the top level's and the inner one."""
    inner = text_config(config)
    return (config, inner) if inner else (config,)


def stating_levels(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The dotted paths to the configs that describe the language model: `""`, `"text_config."`."""
    return ("", "text_config.") if text_config(config) else ("",)
