"""FSDP1's local state dicts: the shapes of flattened parameters, and flat parameters cut into them.

    use_orig_params=True   model.layers.0.mlp.up_proj.weight, flattened: the base has its shape
    use_orig_params=False  model.layers.0._flat_param: all parameters of the module end to end, in
                           the order in which it registers them, those of wrapped modules left out

No file states the order. It is known for the families below, and tests compare it with their loaded
classes; reshard could not notice that two tensors of equal size changed places. transformers before
4.31 registered `down_proj` before `up_proj` in Llama.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from reshard.core.catalog import Catalog
from reshard.core.findings import Finding
from reshard.core.rearrange import crop
from reshard.core.regex import regex
from reshard.core.tensors import Box, Entry, Shape, TensorSpec
from reshard.errors import NamesError, PlanError, UnsupportedError, listed
from reshard.naming.beginnings import heads
from reshard.naming.layouts import Version
from reshard.naming.memory import NEWEST, to_memory
from reshard.naming.schema import Schema, says_tied
from reshard.naming.search import prefixes, unwrap

_FLAT = "_flat_param"
#: Model types whose classes register their parameters in this order.
ORDERED = ("llama", "mistral", "qwen2", "qwen3")
#: Modules of a decoder layer, in that order; each holds its weight, then its bias.
IN_LAYER = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "self_attn.q_norm", "self_attn.k_norm",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    "input_layernorm", "post_attention_layernorm",
)  # fmt: skip
# Before and after the layers.
_OUTSIDE = {"model.embed_tokens": 0, "model.norm": 2, "lm_head": 3, "score": 3}
_LAYER = regex(r"model\.layers\.(\d+)\.(.+)")
# Versions whose names in memory differ, as far as a whole tensor goes: one of each layout.
_VERSIONS: tuple[Version, ...] = (NEWEST, (4, 57), (4, 52), (4, 49))
_LISTED = 5


class Shaped(Struct, frozen=True):
    """A checkpoint's entries with the shapes of the model; `rules` say what was done, in words."""

    entries: Mapping[str, Entry]
    rules: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()


def shaped(catalog: Catalog, schema: Schema) -> Shaped:
    """The catalog's tensors, those that it holds flattened in the shapes that the base states.

    Raises `NamesError` where the base has no tensor of that name and size, `UnsupportedError` where
    nothing says in which order a flat parameter holds its tensors.
    """
    if not catalog.unshaped:
        return Shaped(catalog.entries)
    flats = {name for name in catalog.unshaped if name.rpartition(".")[2] == _FLAT}
    entries = {name: entry for name, entry in catalog.entries.items() if name not in flats}
    entries |= _named(catalog, catalog.unshaped - flats, schema)
    if not flats:
        return Shaped(entries)
    units = {_path(name): catalog.entries[name] for name in sorted(flats)}
    cut = _cut(units, schema, catalog.origin.world_size or 1)
    twice = entries.keys() & cut.keys()
    if twice:
        raise NamesError(
            "it is stored both beside the flat parameters and inside one of them.",
            tensor=min(twice),
        )
    kind = schema.config["model_type"]
    order = f"in the order of {kind}'s modules (transformers 4.31 and later)"
    message = (
        f"{len(units)} flat parameters do not name their contents; they were cut {order}. "
        "reshard could not notice tensors of equal size in another order."
    )
    rule = f"flat parameters cut {order} ({len(units)})"
    return Shaped({**entries, **cut}, (rule,), (Finding("flat-parameters-cut", message),))


def _path(name: str) -> str:
    """The path of the module that a flat parameter is of, with its dot; the root's is empty."""
    return unwrap(name).removesuffix(_FLAT)


def _cut(units: Mapping[str, Entry], schema: Schema, world: int) -> dict[str, Entry]:
    """The parameters in the flat ones, by the base's names."""
    root = min(units, key=len)
    specs: dict[str, list[TensorSpec]] = {path: [] for path in units}
    for spec in _ordered(schema):
        paths = (f"{head}." for head in reversed(heads(f"{root}{spec.name}")))
        specs[next(filter(units.__contains__, paths), root)].append(spec)
    entries: dict[str, Entry] = {}
    for path, entry in units.items():
        total = sum(spec.numel for spec in specs[path])
        numel = entry.spec.numel
        if not 0 <= numel - total < world:
            raise NamesError(
                f"it holds {numel} elements, but the base's tensors in that module have {total}: "
                "the base is another model, or only a part of it was trained.",
                tensor=f"{path}{_FLAT}",
                hint="Name the base that the training started from.",
            )
        start = 0
        for spec in specs[path]:
            box = Box((numel,), (start,), (spec.numel,))
            entries[spec.name] = _reshaped(crop(entry, box), spec.name, spec.shape)
            start += spec.numel
    return entries


def _ordered(schema: Schema) -> list[TensorSpec]:
    """The base's tensors in the order in which a loaded model registers them."""
    return [schema.specs[name] for name in _registered(schema.specs, schema.config)]


def _registered(names: Iterable[str], config: Mapping[str, Any]) -> list[str]:
    """A model's parameters in the order in which a loaded model registers them.

    Raises `UnsupportedError` where that is not known.
    """
    kind = config.get("model_type")
    if kind not in ORDERED:
        raise UnsupportedError(
            "it holds flat parameters, which do not name their contents, and their order is known "
            f"only for {', '.join(ORDERED)}, not for {kind!r}.",
            hint="Load the checkpoint into the training run and save it with SHARDED_STATE_DICT.",
        )
    tied = says_tied(config)
    return sorted((n for n in names if not (tied and n == "lm_head.weight")), key=_place)


def in_order(names: Iterable[str], config: Mapping[str, Any]) -> list[str] | None:
    """A model's parameters in the order in which a loaded model registers them; None where that is
    not known."""
    try:
        return _registered(names, config)
    except UnsupportedError:
        return None


def _place(name: str) -> tuple[int, int, int, int]:
    """A parameter's position in the order."""
    module, _, last = name.rpartition(".")
    layer = _LAYER.fullmatch(module)
    if last in ("weight", "bias"):
        if layer is not None and layer[2] in IN_LAYER:
            return (1, int(layer[1]), IN_LAYER.index(layer[2]), last == "bias")
        if layer is None and module in _OUTSIDE:
            return (_OUTSIDE[module], 0, 0, last == "bias")
    raise UnsupportedError(
        "its place among the flat parameters is not known.",
        tensor=name,
        hint="Load the checkpoint into the training run and save it with SHARDED_STATE_DICT.",
    )


def _named(catalog: Catalog, names: frozenset[str], schema: Schema) -> dict[str, Entry]:
    """Flattened parameters, reshaped as in the base or in a loaded model of it."""
    if not names:
        return {}
    numels = {unwrap(name): catalog.entries[name].spec.numel for name in names}
    closest: dict[str, Shape] = {}
    fitting: list[dict[str, Shape]] = []
    for table in _tables(schema):
        for prefix in prefixes(numels, None):
            found = {
                name: shape
                for name, numel in numels.items()
                if (shape := table.get(name.removeprefix(prefix))) is not None
                and math.prod(shape) == numel
            }
            closest = max(closest, found, key=len)
            if len(found) == len(numels):
                fitting.append(found)
    if not fitting:
        lost = sorted(numels.keys() - closest.keys())
        raise NamesError(
            f"it holds {len(numels)} flattened tensors without shapes, and for {len(lost)} of "
            f"them the base has no tensor of that name and size: {listed(lost, _LISTED)}.",
            unexpected=tuple(lost),
            hint="Name the base that the training started from.",
        )
    first = fitting[0]
    if any(other != first for other in fitting):
        raise NamesError(
            "it holds tensors flattened, without their shapes, and loaded models of the base have "
            "them in several.",
        )
    return {
        name: _reshaped(catalog.entries[name], name, first[unwrap(name)]) for name in sorted(names)
    }


def _tables(schema: Schema) -> Iterator[dict[str, Shape]]:
    """Name -> shape: as in the base's files, and as loaded models have them."""
    yield {name: spec.shape for name, spec in schema.specs.items()}
    bare = {name: Entry(spec, ()) for name, spec in schema.specs.items()}
    for version in _VERSIONS if schema.config else ():
        try:
            loaded = to_memory(bare, schema.config, version)
        except (UnsupportedError, PlanError):
            continue
        yield {name: entry.spec.shape for name, entry in loaded.items()}


def _reshaped(entry: Entry, name: str, shape: Shape) -> Entry:
    """A flattened tensor, whose boxes are over its elements in a row, in its shape."""
    return replace(entry, spec=TensorSpec(name, entry.spec.dtype, shape))


def refuse(catalog: Catalog) -> None:
    """Refuse to write flattened tensors as they are. Raises `PlanError`."""
    if catalog.unshaped:
        raise PlanError(
            f"it holds {len(catalog.unshaped)} flattened tensors, and no file states their shapes "
            "(a local state dict of FSDP1).",
            path=catalog.origin.root,
            hint="Pass --base, the model that the training started from.",
        )
