"""Models in the names of Megatron-Core: renamed, and split into the tensors of the hub.

    embedding.word_embeddings.weight [V + padding, h]               model.embed_tokens.weight
    output_layer.weight [V + padding, h]                            lm_head.weight
    decoder.layers.3.self_attention.linear_qkv.weight               layer 3's q_proj, k_proj, v_proj
    decoder.layers.self_attention.linear_qkv.weight [L, ..]         those of all layers, stacked
    decoder.layers.3.mlp.linear_fc1.weight [2I, h]                  gate_proj, then up_proj
    decoder.layers.3.mlp.linear_fc1.weight_w, .weight_v             the same as two tensors
    decoder.layers.3.mlp.experts.experts.linear_fc1.weight [E, ..]  all experts, stacked
    decoder.layers.3.mlp.experts.experts.7.linear_fc1.weight_w      expert 7 by itself
    mtp.layers.0.transformer_layer...                               the layer after the last one

Rows of `linear_qkv` are grouped by key head: for each of them its queries, its key, its value.
Norms have two names, with and without TransformerEngine's fused modules. `arrangements` is a pure
function of names, shapes and config; where no vocabulary is padded its result has an inverse
(`core.arrangement.inverse`). Read off megatron-core 0.12 and 0.16 (transformer/, models/gpt),
Megatron-Bridge 0.3 (Gemma), and files that megatron-core wrote.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from msgspec import Struct

from reshard.core.arrangement import Arrangement, Concat, Crop, Select, Whole, sources
from reshard.core.regex import regex
from reshard.core.tensors import Box, Shape
from reshard.errors import NamesError
from reshard.naming.families import MORE_LAYERS
from reshard.naming.megatron_families import family_of
from reshard.naming.schema import Schema, number
from reshard.naming.search import unwrap

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
#: Within a layer: Megatron's name -> the hub's.
NAMES = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "self_attention.linear_proj.bias": "self_attn.o_proj.bias",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    "mlp.linear_fc2.bias": "mlp.down_proj.bias",
    "mlp.router.weight": "mlp.gate.weight",
}
#: Within a layer of multi-token prediction, beside a whole layer.
MTP_NAMES = {
    "enorm.weight": "enorm.weight",
    "hnorm.weight": "hnorm.weight",
    "eh_proj.weight": "eh_proj.weight",
    "final_layernorm.weight": "shared_head.norm.weight",
}
#: Copies that the hub's layers of multi-token prediction have of these; Megatron shares them.
MTP_COPIES = {"embed_tokens.weight": EMBEDDING, "shared_head.head.weight": HEAD}
_QKV = regex(r"self_attention\.linear_qkv\.(weight|bias)")
#: Gate and up in one tensor, or in two: `weight` and `bias`, each with `_w` and `_v`.
_FC1 = regex(r"(.+)\.linear_fc1\.(weight|bias)(_w|_v)?")
_EXPERT = regex(r"mlp\.experts\.experts\.(?:(\d{1,6})\.)?(linear_fc[12]\.weight(?:_w|_v)?)")
_LAYER = regex(r"(decoder|mtp)\.layers\.(?:(\d{1,6})\.)?(.+)")
_INNER = regex(r"(?:transformer_layer|mtp_model_layer)\.(.+)")
#: A name that every such model has.
_SIGN = regex(r"(?:.*\.)?decoder\.layers\.(?:\d+\.)?self_attention\.linear_proj\.weight")
#: Buffers that are computed, and statistics of the router's balance: of no model on the hub.
LEFT_OUT = regex(
    r"(?:.*\.)?(?:inv_freq|router\.(?:local_tokens_per_expert|global_tokens_per_expert))"
)
#: More experts or layers than any model has: a tensor without elements may state any number.
MAX_ROWS = 1 << 16


class Named(Struct, frozen=True):
    """A model's tensors by the hub's names, as arrangements of Megatron's.

    `padding`: rows of padded vocabularies that are left out, by Megatron's names. `left_out`: what
    is of no model on the hub. Names that are not known stand for themselves in `outputs`.
    """

    outputs: Mapping[str, Arrangement]
    padding: Mapping[str, int]
    left_out: tuple[str, ...]


def is_megatron(names: Iterable[str], schema: Schema) -> bool:
    """Whether a checkpoint's tensors have Megatron-Core's names and the base's do not."""
    if any(_SIGN.fullmatch(name) for name in schema.specs):
        return False
    return any(_SIGN.fullmatch(name) for name in names)


def arrangements(shapes: Mapping[str, Shape], schema: Schema) -> Named:
    """The hub's tensors, each as an arrangement of the tensors that `shapes` names.

    Raises `UnsupportedError` for a family whose names there are not known, `NamesError` where
    shapes are not those of the base's config, or two tensors are one of the hub's.
    """
    return _Naming(shapes, schema).named()


class _Naming:
    def __init__(self, shapes: Mapping[str, Shape], schema: Schema) -> None:
        self._shapes = shapes
        self._schema = schema
        self._config = schema.config
        self._family = family_of(schema.config)
        self._layers = number(schema.config, "num_hidden_layers")
        self._outputs: dict[str, Arrangement] = {}
        self._padding: dict[str, int] = {}

    def named(self) -> Named:
        left_out = []
        for name, shape in self._shapes.items():
            plain = unwrap(name)
            if LEFT_OUT.fullmatch(plain):
                left_out.append(name)
                continue
            for hub, made in self._tensors(plain, Whole(name), shape):
                if hub in self._outputs:
                    other = next(sources(self._outputs[hub]))
                    raise NamesError(
                        f"it and {other!r} both map to {hub!r}.", tensor=name,
                        unexpected=(name,),
                    )  # fmt: skip
                self._outputs[hub] = made
        self._copy_shared()
        return Named(self._outputs, self._padding, tuple(left_out))

    def _tensors(self, name: str, of: Whole, shape: Shape) -> Iterator[tuple[str, Arrangement]]:
        """The hub's tensors in one tensor."""
        layer = _LAYER.fullmatch(name)
        if name == "embedding.word_embeddings.weight":
            yield EMBEDDING, self._vocabulary(of, shape, EMBEDDING)
        elif name == "output_layer.weight":
            yield self._head(of, shape)
        elif name == "decoder.final_layernorm.weight":
            yield "model.norm.weight", of
        elif layer is None:
            yield name, of
        elif layer[2] is not None:
            yield from self._layer(layer[1], int(layer[2]), layer[3], of, shape)
        else:
            for index in range(self._stacked(layer[1], name, shape)):
                yield from self._layer(layer[1], index, layer[3], Select(of, index), shape[1:])

    def _stacked(self, stack: str, name: str, shape: Shape) -> int:
        """The number of layers that a tensor holds, stacked."""
        count = shape[0] if shape else 0
        expected = self._layers if stack == "decoder" else self._more_layers()
        if count != expected:
            raise NamesError(
                f"it holds {count} layers, stacked; the base has {expected}.",
                tensor=name,
                hint="Check that --base is the model that the training started from.",
            )
        return count

    def _more_layers(self) -> int:
        count = self._config.get(MORE_LAYERS)
        return count if type(count) is int and 0 <= count < MAX_ROWS else 0

    def _layer(
        self, stack: str, index: int, name: str, of: Arrangement, shape: Shape
    ) -> Iterator[tuple[str, Arrangement]]:
        """The hub's tensors in one tensor of one layer."""
        if stack == "decoder":
            if index >= self._layers:
                raise NamesError(
                    f"it is of layer {index}, and the base has {self._layers} layers.",
                    tensor=next(sources(of)),
                    hint="Check that --base is the model that the training started from.",
                )
            found = self._in_layer(name, of, shape)
        else:
            index += self._layers
            inner = _INNER.fullmatch(name)
            if inner is not None:
                found = self._in_layer(inner[1], of, shape)
            else:
                found = iter(((MTP_NAMES.get(name, name), of),))
        for hub, made in found:
            yield f"model.layers.{index}.{hub}", made

    def _in_layer(
        self, name: str, of: Arrangement, shape: Shape
    ) -> Iterator[tuple[str, Arrangement]]:
        family = self._family
        expert, fused = _EXPERT.fullmatch(name), _FC1.fullmatch(name)
        projections = None if family.latent else _QKV.fullmatch(name)
        if name in family.names or name in NAMES:
            yield family.names.get(name) or NAMES[name], of
        elif projections is not None:
            yield from self._heads(projections[1], of, shape)
        elif expert is not None:
            yield from self._experts(expert[1], expert[2], of, shape)
        elif fused is not None and fused[1] in ("mlp", "mlp.shared_experts"):
            hub = "mlp" if fused[1] == "mlp" else family.shared or fused[1]
            yield from self._halves(fused, (f"{hub}.gate_proj", f"{hub}.up_proj"), of, shape)
        elif family.shared and name == "mlp.shared_experts.linear_fc2.weight":
            yield f"{family.shared}.down_proj.weight", of
        else:
            yield name, of

    def _halves(
        self, fused: re.Match[str], hubs: tuple[str, str], of: Arrangement, shape: Shape
    ) -> Iterator[tuple[str, Arrangement]]:
        """Gate and up, in one tensor one after the other, or one of them."""
        kind, which = fused[2], fused[3]
        if which is not None:
            yield f"{hubs[which == '_v']}.{kind}", of
            return
        if not shape or shape[0] % 2:
            raise NamesError(
                f"its shape is {shape}, which cannot be split into gate and up.",
                tensor=next(sources(of)),
            )
        half = shape[0] // 2
        for place, hub in enumerate(hubs):
            yield f"{hub}.{kind}", _rows(of, shape, place * half, half)

    def _experts(
        self, number: str | None, name: str, of: Arrangement, shape: Shape
    ) -> Iterator[tuple[str, Arrangement]]:
        """The tensors of one expert, or of all of them, stacked."""
        gate, up, down = self._family.expert
        stacked = number is None
        if len(shape) != 2 + stacked or shape[0] > MAX_ROWS:
            raise NamesError(
                f"its shape is {shape} in a layer, which is not that of experts.",
                tensor=next(sources(of)),
            )
        fused = _FC1.fullmatch(f"mlp.{name}")
        for expert in range(shape[0]) if stacked else (int(number or 0),):
            one, sizes = (Select(of, expert), shape[1:]) if stacked else (of, shape)
            hub = f"{self._family.moe}.experts.{expert}"
            if fused is None:
                yield f"{hub}.{down}.weight", one
            else:
                yield from self._halves(fused, (f"{hub}.{gate}", f"{hub}.{up}"), one, sizes)

    def _heads(self, kind: str, of: Arrangement, shape: Shape) -> Iterator[tuple[str, Arrangement]]:
        """Queries, keys and values, whose rows are grouped by key head."""
        config = self._config
        heads = number(config, "num_attention_heads")
        groups = number(config, "num_key_value_heads", "num_attention_heads")
        if "head_dim" in config and config["head_dim"] is not None:
            size = number(config, "head_dim")
        else:
            size = number(config, "hidden_size") // heads
        queries = heads // groups
        if heads % groups or shape[:1] != ((heads + 2 * groups) * size,):
            raise NamesError(
                f"its shape is {shape} in a layer; {heads} query and {groups} key heads of {size} "
                f"rows, as the base has, are {(heads + 2 * groups) * size} rows.",
                tensor=next(sources(of)),
                hint="Check that --base is the model that the training started from.",
            )
        each = (queries + 2) * size
        for hub, start, rows in (
            ("q_proj", 0, queries * size),
            ("k_proj", queries * size, size),
            ("v_proj", (queries + 1) * size, size),
        ):
            runs = tuple(_rows(of, shape, group * each + start, rows) for group in range(groups))
            yield f"self_attn.{hub}.{kind}", runs[0] if groups == 1 else Concat(runs, 0)

    def _head(self, of: Whole, shape: Shape) -> tuple[str, Arrangement]:
        """The output layer: a vocabulary's, or a critic's of one row."""
        if shape[:1] == (1,):
            return "score.weight", of
        return HEAD, self._vocabulary(of, shape, HEAD)

    def _vocabulary(self, of: Whole, shape: Shape, hub: str) -> Arrangement:
        """The rows of the base's vocabulary; those after them are padding."""
        rows = self._vocabulary_rows(hub)
        if len(shape) != 2 or shape[0] < rows:
            raise NamesError(
                f"its shape is {shape}, and the base's vocabulary has {rows} rows.",
                tensor=of.name,
                hint="Name the base whose vocabulary the training had.",
            )
        if shape[0] == rows:
            return of
        self._padding[of.name] = shape[0] - rows
        return _rows(of, shape, 0, rows)

    def _vocabulary_rows(self, hub: str) -> int:
        for name in (hub, EMBEDDING, EMBEDDING.removeprefix("model.")):
            spec = self._schema.specs.get(name)
            if spec is not None and spec.shape:
                return spec.shape[0]
        return number(self._config, "vocab_size")

    def _copy_shared(self) -> None:
        """The copies of embedding and head that the base's layers of multi-token prediction have,
        where the checkpoint holds such a layer."""
        for index in range(self._layers, self._layers + self._more_layers()):
            start = f"model.layers.{index}."
            if f"{start}eh_proj.weight" not in self._outputs:
                continue
            for name, shared in MTP_COPIES.items():
                if start + name in self._schema.specs and shared in self._outputs:
                    self._outputs[start + name] = self._outputs[shared]


def _rows(of: Arrangement, shape: Shape, start: int, count: int) -> Arrangement:
    tail = shape[1:]
    return Crop(of, Box(shape, (start, *(0 for _ in tail)), (count, *tail)))
