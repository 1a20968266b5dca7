"""The base model as its own files state it: names, shapes, dtypes and config."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from itertools import product
from typing import Any

from msgspec import Struct, field

from reshard.core.tensors import TensorSpec
from reshard.errors import NamesError
from reshard.naming import families, patterns
from reshard.naming.families import BACKBONES, FAMILIES, PLAIN
from reshard.naming.layouts import Family, Layout, View

# Ends of the names of classes that have a head although they are called a model.
_HEADED = ("LMHeadModel", "DoubleHeadsModel", "MTModel", "EncoderDecoderModel")


class Schema(Struct, frozen=True):
    """What the output must hold: `specs` by name, as the base's safetensors headers state them.

    `config` is the parsed `config.json`, empty where there is none.
    """

    specs: Mapping[str, TensorSpec]
    config: Mapping[str, Any] = field(default_factory=dict)


def views(config: Mapping[str, Any], *, guess: bool = True) -> tuple[View, ...]:
    """The layouts that a model of this config may have, the hub's first.

    For a model type without a family, all families' layouts are tried, and names and shapes decide;
    without `guess` it has only the hub's names.
    """
    text = family(text_config(config).get("model_type"))
    inner = PLAIN.layouts[:1] if text is None or text in families.ALONE else text.layouts
    known = family(config.get("model_type"))
    guesses = (PLAIN, *FAMILIES) if guess else (PLAIN,)
    outer = guesses if known is None else (known,)
    layouts = [layout for candidate in outer for layout in candidate.layouts]
    return tuple(View(pair) for pair in product(layouts, inner))


def views_of(
    modules: Container[str], prefix: str, config: Mapping[str, Any], *, guess: bool = True
) -> tuple[View, ...]:
    """The layouts that names in these modules may be in once the prefix is off; `guess` as in
    `views`.

    Those of the backbone's files are left out where the backbone is in a name or in the prefix.
    """
    part = backbone_part(config)
    whole = views(config, guess=guess)
    if f".{prefix}".endswith(f".{part}.") or prefix + part in modules:
        return whole
    bare = bare_layout(config)
    return (*whole, *(View((bare, *view.layouts)) for view in whole))


def bare_layout(config: Mapping[str, Any]) -> Layout:
    """The layout of files saved from the backbone class: no name contains the backbone's part."""
    part = backbone_part(config)
    names = (("lm_head.**", "lm_head.**"), (f"{part}.**", "**"))
    return Layout("as saved from the backbone class", (0,), names=names)


def backbone_part(config: Mapping[str, Any]) -> str:
    """What a class with a head calls the backbone that is in it: `model`, `transformer`, `bert`."""
    kind = config.get("model_type")
    return next((part for part, types in BACKBONES if kind in types), "model")


def comes_with_base(name: str, config: Mapping[str, Any]) -> bool:
    """Whether training cannot change a tensor of the base: it is computed from the config, or
    belongs to layers that no loaded model holds. Every output has the base's."""
    return is_constant(name, config) or is_unheld(name, config)


def is_constant(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a module computes a tensor from its config."""
    return constants_of(config)(name)


def constants_of(config: Mapping[str, Any]) -> Callable[[str], bool]:
    """`is_constant` of one config, for very many names."""
    own = families.CONSTANTS_OF.get(str(config.get("model_type")))

    def is_one(name: str) -> bool:
        if own is not None and patterns.matches_any(own, name):
            return True
        return name.endswith(_CONSTANT) and patterns.matches_any(families.CONSTANTS, name)

    return is_one


# Of 40,000 names, nearly all end otherwise.
_CONSTANT = tuple({f".{pattern.rpartition('.')[2]}" for pattern in families.CONSTANTS})


def is_unheld(name: str, config: Mapping[str, Any]) -> bool:
    """Whether no loaded model holds a tensor of a model's files: a multi-token-prediction layer."""
    return unheld_of(config)(name)


def unheld_of(config: Mapping[str, Any]) -> Callable[[str], bool]:
    """`is_unheld` of one config, for very many names."""
    more = [level for level in levels(config) if level.get(families.MORE_LAYERS)]

    def is_one(name: str) -> bool:
        if "mtp" in name and patterns.matches_any(families.UNHELD, name):
            return True
        for level in more:
            first, count = level.get("num_hidden_layers"), level[families.MORE_LAYERS]
            found = next(filter(None, (patterns.match(p, name) for p in families.LAYERS)), None)
            if found and isinstance(first, int) and isinstance(count, int) and found[0].isdecimal():
                return first <= int(found[0]) < first + count
        return False

    return is_one


#: Ends of the names of classes that score: a `score` stands in place of their output head.
CLASSIFIERS = ("ForSequenceClassification", "ForTokenClassification")


def classes_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The classes that the config names."""
    named = config.get("architectures")
    return tuple(map(str, named)) if isinstance(named, list) else ()


def is_backbone(config: Mapping[str, Any]) -> bool:
    """Whether the config names a class without any head."""
    first = next(iter(classes_of(config)), "")
    return first.endswith(("Model", "Encoder")) and not first.endswith(_HEADED)


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
    """Whether the config states that head and embedding are two tensors, and nowhere the
    opposite."""
    stated = [level.get("tie_word_embeddings") for level in levels(config)]
    return False in stated and True not in stated


def number(config: Mapping[str, Any], *keys: str) -> int:
    """The first of these numbers that the config states. Raises `NamesError` where it has none."""
    for key in keys:
        value = config.get(key)
        if type(value) is int and 0 < value < 1 << 32:
            return value
    raise NamesError(f"the config states no {keys[0]}, which is needed to arrange its tensors.")


def levels(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """The configs that describe the language model: the top level's and the inner one."""
    inner = text_config(config)
    return (config, inner) if inner else (config,)


def stating_levels(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The dotted paths to the configs that describe the language model: `""`, `"text_config."`."""
    return ("", "text_config.") if text_config(config) else ("",)
