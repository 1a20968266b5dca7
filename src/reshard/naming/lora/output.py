"""Adapters as updates to merge into the base's tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct, field

from reshard.core import rearrange
from reshard.core.arithmetic import LowRank, computed
from reshard.core.tensors import Entry, Equal
from reshard.errors import NamesError, PlanError, UnsupportedError
from reshard.naming.lora import methods
from reshard.naming.lora.config import AdapterConfig
from reshard.naming.lora.find import Adapter, Separated, name_in_peft, shape_of
from reshard.naming.name_map import NameMap

# Adapted embeddings that are compared with every other adapter: models have two. Of more, all count
# as updated apart, which costs a head of its own at most.
_MOST_EMBEDDINGS = 64


def keys(separated: Separated, equal: Equal | None) -> dict[str, str]:
    """Each updated tensor -> a key of its update; tensors with equal keys get equal changes.

    PEFT's `ensure_weight_tying` gives a head the adapter of the embedding that it is tied to,
    transposed. Every other update belongs to one tensor. Without `equal` no value is read.
    """
    found = {f"{module}.weight": module for module in separated.adapters}
    plain = {m: a for m, a in separated.adapters.items() if a.magnitude is None}
    linear = [adapter for adapter in plain.values() if not adapter.embedding]
    embeddings = {module: adapter for module, adapter in plain.items() if adapter.embedding}
    if len(embeddings) > _MOST_EMBEDDINGS:
        return found
    for module, adapter in embeddings.items():
        a, b = (rearrange.transpose(entry, 0, 1) for entry in (adapter.b, adapter.a))
        for other in linear:
            if _same(a, other.a, equal) and _same(b, other.b, equal):
                found[f"{other.module}.weight"] = module
    return found


def _same(one: Entry, other: Entry, equal: Equal | None) -> bool:
    if (one.spec.shape, one.spec.dtype) != (other.spec.shape, other.spec.dtype):
        return False
    return one.fragments == other.fragments or (equal is not None and equal(one, other))


class Updates(Struct, frozen=True):
    """The updated weights: by the output's name, where they are one of its tensors; by the
    checkpoint's, where the output stacks, splits or transposes them."""

    by_output: Mapping[str, Entry] = field(default_factory=dict)
    by_source: Mapping[str, Entry] = field(default_factory=dict)


def updates(
    separated: Separated,
    name_map: NameMap,
    config: AdapterConfig,
    base: Mapping[str, Entry],
    *,
    keys: Mapping[str, str] | None = None,
    base_config: Mapping[str, Any] | None = None,
) -> Updates:
    """Each adapted weight with its update.

    `name_map` maps `separated.entries`, `base` are the base model's own tensors: those that the
    checkpoint does not hold are taken from there. `keys` are those that the fit was told.

    Raises `UnsupportedError` for an adapter on a weight that the checkpoint does not hold and the
    base stacks or turns.
    """
    outputs: dict[str, list[str]] = {}
    for output, own in name_map.origins.items():
        outputs.setdefault(own, []).append(output)
    known = keys or {}
    placed = {known.get(name) for name in outputs}
    turned = methods.turned_modules((base_config or {}).get("model_type"))
    by_output: dict[str, Entry] = {}
    by_source: dict[str, Entry] = {}
    for module, adapter in separated.adapters.items():
        name = f"{module}.weight"
        places = outputs.get(name, [])
        if not places and known.get(name, module) != module and known[name] in placed:
            continue  # the tensor that it is tied to is updated alike
        absent = name in separated.absent
        if absent:
            _check_place(name, places)
            weight = base[name_map.tied_to.get(places[0], places[0])]
        else:
            weight = separated.entries[name]
        updated = low_rank(
            adapter,
            weight,
            config.scaling(name_in_peft(module, name_map.prefix), adapter.rank),
            turned=module.rpartition(".")[2] in turned if turned else config.fan_in_fan_out,
        )
        if places:
            by_output.update((place, updated.renamed(place)) for place in places)
        else:
            by_source[name] = updated
    return Updates(by_output, by_source)


def lost(separated: Separated, name_map: NameMap, keys: Mapping[str, str]) -> list[str]:
    """The weights that adapters update and that are neither in the checkpoint nor in the base."""
    placed = {keys.get(name) for name in name_map.origins.values()}
    dropped = separated.absent.intersection(name_map.matching.unexpected)
    return sorted(name for name in dropped if keys.get(name) not in placed)


def _check_place(name: str, places: list[str]) -> None:
    """Raises `UnsupportedError` where a weight that the base holds is not one of its tensors."""
    if not places:
        raise UnsupportedError(
            "the base stacks or transposes this weight, which the checkpoint does not hold, so its "
            "adapter cannot be merged.",
            tensor=name,
            hint="Convert a checkpoint of the run that holds all weights.",
        )


def low_rank(adapter: Adapter, base: Entry, scaling: float, *, turned: bool = False) -> Entry:
    """One weight with its update. `turned`: a square one is stored as `[in, out]`.

    Raises `NamesError` where the product does not have the weight's shape, `UnsupportedError`
    where the weight is codes without a scale.
    """
    if base.spec.dtype.is_code or not base.spec.dtype.floating:
        raise UnsupportedError(
            f"it is {base.spec.dtype} and has no scale beside it: an update cannot be merged onto "
            "codes.",
            tensor=base.spec.name,
            hint="Name the unquantised model as the base, or convert a checkpoint that holds the "
            "scales.",
        )
    left, right = adapter.b, adapter.a
    made, shape = shape_of(adapter), base.spec.shape
    # transformers' Conv1D (GPT-2) keeps [in, out]: the only modules with a reversed shape.
    swapped = made == shape[::-1] and (made != shape or turned)
    if adapter.embedding or swapped:
        left, right = rearrange.transpose(adapter.a, 0, 1), rearrange.transpose(adapter.b, 0, 1)
        made = (left.spec.shape[0], right.spec.shape[1])
    if made != shape:
        raise NamesError(
            f"the weight has shape {shape}, but its adapter makes {made}.", tensor=adapter.module
        )
    by_column = adapter.embedding or swapped
    magnitude = adapter.magnitude
    if magnitude is not None:
        magnitude = _vector(magnitude, shape[1 if by_column else 0])
    update = LowRank(base, left, right, scaling, magnitude, by_column=by_column)
    return computed(update, base)


def _vector(magnitude: Entry, length: int) -> Entry:
    """DoRA's magnitude, of as many numbers as the matrix has rows (or columns)."""
    if magnitude.spec.shape != (length,):
        raise PlanError(
            f"DoRA's magnitude is of shape {magnitude.spec.shape}, the weight needs {length} "
            "numbers.",
            tensor=magnitude.spec.name,
        )
    return magnitude
