"""Meta's own Llama: a model of the hub by Meta's names, and its sizes as `params.json` has them.

    model.embed_tokens.weight                 tok_embeddings.weight
    model.layers.0.self_attn.q_proj.weight    layers.0.attention.wq.weight, rows turned back
    lm_head.weight, or the embedding          output.weight

The names and turns are those of `naming.titan`. Llama 1 to 3 are read off Meta's llama, llama3
(llama/model.py) and llama-models (models/llama3/args.py, model.py): width of the feed-forward from
`ffn_dim_multiplier` and `multiple_of`, rotary embeddings scaled by `use_scaled_rope`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from reshard.core.regex import regex
from reshard.core.tensors import Entry
from reshard.errors import NamesError, UnsupportedError, listed
from reshard.naming import titan_into
from reshard.naming.fields import rotary
from reshard.naming.mismatch import WHOLE_MODEL, no_place
from reshard.naming.schema import number

#: The file with a model's sizes.
PARAMS = "params.json"
_WHOSE = "Meta's Llama"
_OUTSIDE = ("tok_embeddings.weight", "norm.weight", "output.weight")
_INSIDE = (
    *(f"attention.{name}.weight" for name in ("wq", "wk", "wv", "wo")),
    *(f"feed_forward.{name}.weight" for name in ("w1", "w2", "w3")),
    "attention_norm.weight",
    "ffn_norm.weight",
)
_LAYER = regex(rf"layers\.\d+\.({'|'.join(map(re.escape, _INSIDE))})")
#: `params.json` -> the fields of the hub's config, of which the first that is there counts.
_STATED = {
    "dim": ("hidden_size",),
    "n_layers": ("num_hidden_layers",),
    "n_heads": ("num_attention_heads",),
    "n_kv_heads": ("num_key_value_heads", "num_attention_heads"),
}
# (multiplier, multiple) of released models; further ones are found from the width.
_WIDTHS = ((None, 256), (1.3, 1024), (1.3, 4096), (1.5, 256), (1.0, 256))
# What Meta's code scales rotary embeddings by where params.json says use_scaled_rope.
_SCALED = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}
_FACTOR = 8
_TO_HF = "Pass --to hf: programs that read such models read the hub's files."


def into(entries: Mapping[str, Entry], config: Mapping[str, Any]) -> dict[str, Entry]:
    """A model's tensors, by the hub's names, by Meta's; a tied head is the embedding once more.

    Raises `UnsupportedError` for another family, `NamesError` where tensors have no place or are
    missing.
    """
    _check_family(config)
    found = titan_into.into(entries, config, whose=_WHOSE).entries
    made: dict[str, Entry] = {}
    unknown = []
    for name, entry in found.items():
        if name in _OUTSIDE or _LAYER.fullmatch(name):
            made[name] = entry.aliased(())
        else:
            unknown.append(name)
        if name == _OUTSIDE[0] and _OUTSIDE[2] in entry.aliases:
            made[_OUTSIDE[2]] = entry.renamed(_OUTSIDE[2]).aliased(())
    if unknown:
        raise no_place(unknown, _WHOSE)
    layers = number(config, "num_hidden_layers")
    needed = [*_OUTSIDE, *(f"layers.{i}.{name}" for i in range(layers) for name in _INSIDE)]
    lacking = [name for name in needed if name not in made]
    if lacking:
        raise NamesError(f"it lacks: {listed(lacking, 3)}, by Meta's names.", hint=WHOLE_MODEL)
    return made


def _check_family(config: Mapping[str, Any]) -> None:
    """Refuse what Meta's code of Llama 1 to 3 does not compute."""
    kind = config.get("model_type")
    heads = number(config, "num_attention_heads")
    width = config.get("head_dim") or number(config, "hidden_size") // heads
    reasons = {
        f"its model_type is {kind!r}": kind != "llama",
        f"its heads have {width} rows": heads * width != number(config, "hidden_size"),
        f"its activation is {config.get('hidden_act')!r}": config.get("hidden_act", "silu")
        != "silu",
    }
    for reason, holds in reasons.items():
        if holds:
            raise UnsupportedError(
                f"--to meta writes Meta's Llama 1 to 3, and {reason}.", hint=_TO_HF
            )


def params(entries: Mapping[str, Entry], config: Mapping[str, Any]) -> dict[str, Any]:
    """What `params.json` states of a model, whose tensors have Meta's names.

    Raises `UnsupportedError` for rotary embeddings that Meta's code does not have, `NamesError`
    where shapes are not the config's.
    """
    shapes = {name: entry.spec.shape for name, entry in entries.items()}
    dim, rows = number(config, "hidden_size"), shapes[_OUTSIDE[0]][0]
    heads = number(config, "num_attention_heads")
    groups = number(config, "num_key_value_heads", "num_attention_heads")
    stated: dict[str, Any] = {"dim": dim, "n_layers": number(config, "num_hidden_layers")}
    stated["n_heads"] = heads
    if groups != heads:  # Llama 1 has no such setting
        stated["n_kv_heads"] = groups
    width = number(config, "intermediate_size")
    multiplier, multiple = width_of(dim, width)
    stated |= {"vocab_size": rows, "multiple_of": multiple}
    if multiplier is not None:
        stated["ffn_dim_multiplier"] = multiplier
    keys = (groups * (dim // heads), dim)
    expected = {"wq": (dim, dim), "wk": keys, "wv": keys, "wo": (dim, dim)}
    sizes = {f"attention.{name}.weight": shape for name, shape in expected.items()}
    sizes |= {f"feed_forward.{name}.weight": (width, dim) for name in ("w1", "w3")}
    sizes["feed_forward.w2.weight"] = (dim, width)
    for name, shape in shapes.items():
        wanted = sizes.get(name.split(".", 2)[-1], shape)
        if shape != wanted:
            raise NamesError(
                f"its shape is {shape}, and the config's model has {wanted}.",
                tensor=name,
                hint="Is the config that of this model?",
            )
    return {**stated, "norm_eps": float(config.get("rms_norm_eps", 1e-6)), **_rotary(config)}


def feed_forward(dim: int, multiplier: float | None, multiple: int) -> int:
    """The width that Meta's code gives a feed-forward.

    >>> feed_forward(4096, None, 256), feed_forward(4096, 1.3, 1024)
    (11008, 14336)
    """
    width = 2 * 4 * dim // 3
    if multiplier is not None:
        width = int(multiplier * width)
    return multiple * -(-width // multiple)


def width_of(dim: int, width: int) -> tuple[float | None, int]:
    """A multiplier and a multiple with which Meta's code makes this width: a release's, if one's
    do."""
    for multiplier, multiple in _WIDTHS:
        if feed_forward(dim, multiplier, multiple) == width:
            return multiplier, multiple
    if 2 * 4 * dim // 3 <= width:
        return None, width
    return (width + 0.5) / (2 * 4 * dim // 3), width


def _rotary(config: Mapping[str, Any]) -> dict[str, Any]:
    """How rotary embeddings are made. Raises `UnsupportedError` for kinds that Meta has not."""
    rope = rotary(config)
    theta = config.get("rope_theta", rope.get("rope_theta", 10000.0))
    stated: dict[str, Any] = {"rope_theta": float(theta)}
    scaling = config.get("rope_scaling") or rope.get("rope_scaling")
    if not isinstance(scaling, Mapping):
        return stated
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind == "default":
        return stated
    factor = scaling.get("factor")
    known = all(scaling.get(name) == value for name, value in _SCALED.items())
    if kind != "llama3" or not known or not isinstance(factor, int | float):
        raise UnsupportedError(
            f"--to meta writes Meta's Llama 1 to 3, and its rotary embeddings are scaled in "
            f"another way ({kind!r}).",
            hint=_TO_HF,
        )
    stated["use_scaled_rope"] = True
    if factor != _FACTOR:
        stated["rope_scaling_factor"] = float(factor)
    return stated


def check(stated: object, config: Mapping[str, Any]) -> None:
    """Refuse a base that is not of the sizes that a `params.json` states. Raises `NamesError`."""
    for name, keys in _STATED.items():
        mine = stated.get(name) if isinstance(stated, Mapping) else None
        theirs = next((config[key] for key in keys if type(config.get(key)) is int), mine)
        if type(mine) is int and mine != theirs:
            raise NamesError(
                f"its {PARAMS} says {name} {mine}, and the base's config {theirs}.",
                hint="Check that --base is the model that the training started from.",
            )
