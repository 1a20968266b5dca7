"""From the hub's names to Megatron-Core's: the tables of `naming.megatron`, read backwards.

    layer 3's q_proj, k_proj, v_proj      decoder.layers.self_attention.linear_qkv.weight [L, ..]
    layer 3's gate_proj, up_proj          decoder.layers.mlp.linear_fc1.weight [L, 2I, h]
    all experts' gate_proj and up_proj    ...mlp.experts.experts.linear_fc1.weight [L, E, 2I, h]

The rules here give only the names and shapes of a model in Megatron-Core. What each tensor is made
of is the inverse of the other direction (`megatron.arrangements`), so the two cannot disagree.
Layers are stacked where all are alike, as Megatron-Core asks for them; those of DeepSeek, whose
first ones are dense, and of other mixtures are tensors of their own. Vocabularies are not padded:
Megatron-Core takes a vocabulary of fewer rows than its own. Norms get both of their names, the one
within TransformerEngine's fused modules and their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from msgspec import Struct

from reshard.core.arrangement import Arrangement, Arranger, inverse
from reshard.core.dtypes import DType
from reshard.core.regex import regex
from reshard.core.tensors import Entry, Extent, FileRef, Fragment, Shape, TensorSpec, whole
from reshard.errors import NamesError, listed
from reshard.naming import megatron, megatron_args
from reshard.naming.families import MORE_LAYERS
from reshard.naming.megatron import EMBEDDING, HEAD, MTP_COPIES, MTP_NAMES, NAMES
from reshard.naming.megatron_families import Family, family_of
from reshard.naming.mismatch import WHOLE_MODEL, no_place
from reshard.naming.schema import Schema, is_constant, number

_OUTSIDE = {
    EMBEDDING: "embedding.word_embeddings.weight",
    "model.norm.weight": "decoder.final_layernorm.weight",
    HEAD: "output_layer.weight",
    "score.weight": "output_layer.weight",
}
_LAYER = regex(r"model\.layers\.(\d{1,6})\.(.+)")
_PROJECTION = regex(r"self_attn\.[qkv]_proj\.(weight|bias)")
#: What every layer has: one name of each.
_NEEDED = (
    ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
    ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
    ("self_attention.linear_proj.weight",),
    ("self_attention.linear_qkv.weight", "self_attention.linear_kv_up_proj.weight"),
    ("mlp.linear_fc1.weight", "mlp.experts.experts.linear_fc1.weight"),
    ("mlp.linear_fc2.weight", "mlp.experts.experts.linear_fc2.weight"),
)
_EXPERTS = "mlp.experts.experts."
_STACKED = regex(r"decoder\.layers\.(?!\d+\.)")
# A tensor of a module that has a state beside its tensors.
_MODULE = regex(r"((?:decoder|mtp)\.(?:.+\.)?(?:linear_\w+|\w*norm|eh_proj))\.\w+")

_Layer = dict[str, Shape]


class Into(Struct, frozen=True):
    """A model by Megatron-Core's names.

    `outputs`: each tensor as an arrangement of the hub's. `aliases`: further names of its bytes.
    `copies`: tensors of the hub that Megatron-Core shares, each with the one whose copy it must be.
    """

    outputs: Mapping[str, Arrangement]
    aliases: Mapping[str, tuple[str, ...]]
    copies: Mapping[str, str]


def into(specs: Mapping[str, TensorSpec], config: Mapping[str, Any]) -> Into:
    """A model's tensors, which `specs` states by the hub's names, by Megatron-Core's.

    Raises `UnsupportedError` for a family whose names there are not known, `NamesError` where
    tensors are missing, have no place, or are not of the config's shapes.
    """
    family = family_of(config, writing=True)
    copies = _copies(specs, config)
    taken = {n: s for n, s in specs.items() if n not in copies and not is_constant(n, config)}
    found = _Builder(taken, config, family).found()
    schema = Schema(taken, config)
    there = {name: shape for name, (shape, _) in found.items()}
    named = megatron.arrangements(there, schema)
    _check_shapes(named.outputs, there, taken)
    symbols = {name: TensorSpec(name, _dtype(taken), shape) for name, shape in there.items()}
    outputs = inverse(named.outputs, symbols)
    aliases = {name: others for name, (_, others) in found.items() if others}
    return Into(outputs, aliases, copies)


def _dtype(specs: Mapping[str, TensorSpec]) -> DType:
    """Any dtype: the arrangements count in elements."""
    return next(iter(specs.values())).dtype


def _copies(specs: Mapping[str, TensorSpec], config: Mapping[str, Any]) -> dict[str, str]:
    """The copies of embedding and head that layers of multi-token prediction have."""
    layers, more = config.get("num_hidden_layers"), config.get(MORE_LAYERS)
    if type(layers) is not int or type(more) is not int:
        return {}
    found = {}
    for index in range(layers, layers + min(more, megatron.MAX_ROWS)):
        for name, shared in MTP_COPIES.items():
            if f"model.layers.{index}.{name}" in specs:
                found[f"model.layers.{index}.{name}"] = shared if shared in specs else EMBEDDING
    return found


class _Builder:
    """Megatron-Core's names and shapes out of the hub's."""

    def __init__(
        self, specs: Mapping[str, TensorSpec], config: Mapping[str, Any], family: Family
    ) -> None:
        self._specs = specs
        self._config = config
        self._layers = number(config, "num_hidden_layers")
        self._family = family
        self._decoder: dict[int, _Layer] = {}
        self._mtp: dict[int, _Layer] = {}
        self._inner: dict[str, list[str]] = {}
        for there, hub in {**NAMES, **family.names}.items():
            if not (family.latent and "linear_qkv" in there):
                self._inner.setdefault(hub, []).append(there)
        expert, moe = "|".join(map(re.escape, family.expert)), re.escape(family.moe)
        self._expert = re.compile(rf"{moe}\.experts\.(\d{{1,6}})\.({expert})\.weight")
        shared = f"|{re.escape(family.shared)}" if family.shared else ""
        self._halves = re.compile(rf"(mlp{shared})\.(gate_proj|up_proj|down_proj)\.(weight|bias)")

    def found(self) -> dict[str, tuple[Shape, tuple[str, ...]]]:
        """Each tensor's shape and its further names."""
        shapes: dict[str, tuple[Shape, tuple[str, ...]]] = {}
        unknown = []
        for name, spec in self._specs.items():
            if name in _OUTSIDE:
                if _OUTSIDE[name] in shapes:
                    raise NamesError("it and lm_head.weight are one tensor there.", tensor=name)
                shapes[_OUTSIDE[name]] = (spec.shape, ())
            elif not self._in_layer(name, spec.shape):
                unknown.append(name)
        if unknown:
            raise no_place(unknown, "Megatron-Core's model")
        self._check()
        stacked = not self._family.latent and self._alike()
        if stacked:
            for name, shape in self._decoder[0].items():
                shapes[f"decoder.layers.{name}"] = ((self._layers, *shape), ())
        else:
            for index, layer in sorted(self._decoder.items()):
                shapes |= {f"decoder.layers.{index}.{n}": (s, ()) for n, s in layer.items()}
        for index, layer in sorted(self._mtp.items()):
            for name, shape in layer.items():
                inner = "" if name in MTP_NAMES else "transformer_layer."
                shapes[f"mtp.layers.{index}.{inner}{name}"] = (shape, ())
        return {name: (shape, tuple(self._others(name))) for name, (shape, _) in shapes.items()}

    def _in_layer(self, name: str, shape: Shape) -> bool:
        """Take one of a layer's tensors; whether it has a place."""
        match = _LAYER.fullmatch(name)
        if match is None:
            return False
        index, inner = int(match[1]), match[2]
        if index < self._layers:
            layer = self._decoder.setdefault(index, {})
        else:
            layer = self._mtp.setdefault(index - self._layers, {})
            own = {hub: there for there, hub in MTP_NAMES.items()}
            if inner in own:
                layer[own[inner]] = shape
                return True
        projection, halves = _PROJECTION.fullmatch(inner), self._halves.fullmatch(inner)
        expert = self._expert.fullmatch(inner)
        if inner in self._inner:
            layer[self._inner[inner][0]] = shape
        elif projection is not None and not self._family.latent:
            _add_rows(layer, f"self_attention.linear_qkv.{projection[1]}", shape)
        elif expert is not None:
            self._add_expert(layer, expert[2], shape)
        elif halves is not None:
            part = "mlp" if halves[1] == "mlp" else "mlp.shared_experts"
            if halves[2] == "down_proj":
                layer[f"{part}.linear_fc2.{halves[3]}"] = shape
            else:
                _add_rows(layer, f"{part}.linear_fc1.{halves[3]}", shape)
        else:
            return False
        return True

    def _add_expert(self, layer: _Layer, projection: str, shape: Shape) -> None:
        """One projection of one expert: the stack grows by one, or by a half."""
        gate, _, down = self._family.expert
        if projection == down:
            name, count = "mlp.experts.experts.linear_fc2.weight", 1
        else:
            # Gate and up are as large; the gates count the experts.
            name, count = "mlp.experts.experts.linear_fc1.weight", int(projection == gate)
            shape = (2 * shape[0], *shape[1:]) if shape else shape
        layer[name] = (layer.get(name, (0,))[0] + count, *shape)

    def _alike(self) -> bool:
        first = self._decoder[0]
        return all(layer == first for layer in self._decoder.values())

    def _check(self) -> None:
        """Refuse a model whose layers lack what each needs."""
        for index in range(self._layers):
            layer = self._decoder.get(index, {})
            lacking = [names[0] for names in _NEEDED if not layer.keys() & {*names}]
            if lacking:
                raise NamesError(
                    f"its layer {index} lacks what Megatron-Core's has: {listed(lacking)}.",
                    hint=WHOLE_MODEL,
                )
        layers = [*self._decoder.values(), *self._mtp.values()]
        stacks = [shape[0] for layer in layers for n, shape in layer.items() if _EXPERTS in n]
        expected = number(self._config, *megatron_args.EXPERTS) if stacks else 0
        if any(count != expected for count in stacks):
            raise NamesError(
                f"a layer has {min(stacks)} experts, and the config says {expected}.",
                hint=WHOLE_MODEL,
            )

    def _others(self, name: str) -> Iterator[str]:
        """The other names of a tensor: norms have two."""
        for names in self._inner.values():
            for own in names if len(names) > 1 else ():
                if name.endswith(f".{own}") or name == own:
                    start = name.removesuffix(own)
                    yield from (start + other for other in names if other != own)
                    return


def _add_rows(layer: _Layer, name: str, shape: Shape) -> None:
    """A part of a fused tensor: its rows are added to those that came before."""
    held = layer.get(name)
    layer[name] = shape if held is None or not shape else (held[0] + shape[0], *shape[1:])


def _check_shapes(
    outputs: Mapping[str, Arrangement], there: Mapping[str, Shape], specs: Mapping[str, TensorSpec]
) -> None:
    """Refuse a model that cannot be recovered by splitting Megatron-Core's tensors of those
    shapes."""
    dtype = _dtype(specs)
    arranger = Arranger({name: _symbol(TensorSpec(name, dtype, s)) for name, s in there.items()})
    lost = outputs.keys() ^ specs.keys()
    if lost:
        raise NamesError(
            f"{len(lost)} of its tensors are not those of one model: {listed(sorted(lost))}.",
            unexpected=tuple(sorted(lost)),
            hint=WHOLE_MODEL,
        )
    for name, made in outputs.items():
        shape = arranger.make(made).spec.shape
        if shape != specs[name].shape:
            raise NamesError(
                f"its shape is {specs[name].shape}, and the config's model has {shape}.",
                tensor=name,
                hint="Is the config that of this model?",
            )


def _symbol(spec: TensorSpec) -> Entry:
    extent = Extent(FileRef(spec.name), 0, spec.nbytes)
    return Entry(spec, (Fragment(whole(spec.shape), extent, spec.dtype),) if spec.numel else ())


def extra_states(shapes: Iterable[tuple[str, Shape]]) -> Iterator[str]:
    """The keys of the states, empty but in FP8, that Megatron-Core's modules ask for beside their
    tensors, which are given with all their names: `decoder.layers.mlp.linear_fc1._extra_state/
    shard_0_4` for layer 0 of 4, `..experts.linear_fc1._extra_state/shard_0.3_4.8` for an expert.
    """
    seen: set[str] = set()
    for name, shape in shapes:
        found = _MODULE.fullmatch(name)
        if found is None:
            continue
        modules = [found[1]]
        if modules[0].endswith("self_attention.linear_proj"):
            modules.append(modules[0].replace("linear_proj", "core_attention"))
        for module in modules:
            if module not in seen:
                seen.add(module)
                yield from _shards(f"{module}._extra_state", shape[: leading_axes(name)])


def leading_axes(name: str) -> int:
    """How many axes of a tensor count layers and experts, which Megatron-Core stacks.

    >>> leading_axes("decoder.layers.mlp.linear_fc2.weight")
    1
    >>> leading_axes("decoder.layers.3.mlp.experts.experts.linear_fc2.weight")
    1
    """
    return (_STACKED.match(name) is not None) + (_EXPERTS in name)


def _shards(key: str, sizes: Shape) -> Iterator[str]:
    """One key for each place along the leading axes."""
    if not sizes:
        yield f"{key}/shard_0_1"
        return
    places: list[tuple[int, ...]] = [()]
    for size in sizes:
        places = [(*place, at) for place in places for at in range(size)]
    total = ".".join(map(str, sizes))
    for place in places:
        yield f"{key}/shard_{'.'.join(map(str, place))}_{total}"
