"""Models in the names of torchtitan and of Meta: renamed to the hub's, with rows of heads
reordered.

torchtitan trains models of its own. Its names are Meta's, with what was added since:

    tok_embeddings.weight                               model.embed_tokens.weight
    layers.0.attention.wq.weight                        ...self_attn.q_proj.weight, turned
    layers.0.attention.qkv_linear.wq.weight             the same, torchtitan 0.3
    layers.0.feed_forward.w1.weight                     ...mlp.gate_proj.weight
    layers.0.moe.experts.w1                             ...mlp.experts.*.gate_proj.weight, stacked
    layers.0.moe.routed_experts.inner_experts.w1_EFD    the same, torchtitan 0.3
    mtp_layers.0.mtp_norm.weight                        model.layers.(L+0).shared_head.norm.weight
    output.weight, lm_head.weight                       lm_head.weight

"turned" above: the rows of Llama's queries and keys are reordered, because rotary embeddings pair
neighbouring rows of a head there, and rows half a head apart on the hub; Llama 4's do so on the hub
too. Its experts' gate and up are one tensor there. Read off torchtitan 0.3 (models/llama3, qwen3,
deepseek_v3: state_dict_adapter.py), its models of 2025 (llama4 too), and Meta's llama-models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from reshard.core import rearrange
from reshard.core.strides import contiguous_strides
from reshard.core.tensors import Box, Entry, Fragment
from reshard.errors import NamesError, UnsupportedError, listed
from reshard.naming import patterns
from reshard.naming.megatron import MTP_COPIES
from reshard.naming.mismatch import check_stacked
from reshard.naming.name_map import Translation
from reshard.naming.scanning import any_contains
from reshard.naming.schema import Schema, number
from reshard.naming.search import unwrap, unwrapped

#: (on the hub, in torchtitan); `*` is a layer.
NAMES = (
    ("model.embed_tokens.weight", "tok_embeddings.weight"),
    ("model.norm.weight", "norm.weight"),
    ("lm_head.weight", "output.weight"),
    ("lm_head.weight", "lm_head.weight"),
    ("model.layers.*.input_layernorm.weight", "layers.*.attention_norm.weight"),
    ("model.layers.*.post_attention_layernorm.weight", "layers.*.ffn_norm.weight"),
    ("model.layers.*.self_attn.o_proj.weight", "layers.*.attention.wo.weight"),
    ("model.layers.*.self_attn.v_proj.weight", "layers.*.attention.wv.weight"),
    ("model.layers.*.self_attn.v_proj.weight", "layers.*.attention.qkv_linear.wv.weight"),
    ("model.layers.*.self_attn.q_proj.weight", "layers.*.attention.wq.weight"),
    ("model.layers.*.self_attn.q_proj.weight", "layers.*.attention.qkv_linear.wq.weight"),
    ("model.layers.*.self_attn.k_proj.weight", "layers.*.attention.wk.weight"),
    ("model.layers.*.self_attn.k_proj.weight", "layers.*.attention.qkv_linear.wk.weight"),
    ("model.layers.*.self_attn.q_norm.weight", "layers.*.attention.q_norm.weight"),
    ("model.layers.*.self_attn.k_norm.weight", "layers.*.attention.k_norm.weight"),
    ("model.layers.*.mlp.gate_proj.weight", "layers.*.feed_forward.w1.weight"),
    ("model.layers.*.mlp.up_proj.weight", "layers.*.feed_forward.w3.weight"),
    ("model.layers.*.mlp.down_proj.weight", "layers.*.feed_forward.w2.weight"),
    ("model.layers.*.mlp.gate.weight", "layers.*.moe.router.gate.weight"),
)
#: (on the hub, in torchtitan), of tensors with a leading dimension of experts.
EXPERTS = (
    ("model.layers.{}.mlp.experts.{}.gate_proj.weight", "layers.*.moe.experts.w1"),
    ("model.layers.{}.mlp.experts.{}.up_proj.weight", "layers.*.moe.experts.w3"),
    ("model.layers.{}.mlp.experts.{}.down_proj.weight", "layers.*.moe.experts.w2"),
    (
        "model.layers.{}.mlp.experts.{}.gate_proj.weight",
        "layers.*.moe.routed_experts.inner_experts.w1_EFD",
    ),
    (
        "model.layers.{}.mlp.experts.{}.up_proj.weight",
        "layers.*.moe.routed_experts.inner_experts.w3_EFD",
    ),
    (
        "model.layers.{}.mlp.experts.{}.down_proj.weight",
        "layers.*.moe.routed_experts.inner_experts.w2_EDF",
    ),
)
#: Buffers that are computed, and statistics of the router's balance: of no model on the hub.
LEFT_OUT = ("rope.freqs", "freqs_cis", "rope.cache", "layers.*.moe.tokens_per_expert")
_DEEPSEEK = (
    ("model.layers.*.self_attn.q_a_proj.weight", "layers.*.attention.wq_a.weight"),
    ("model.layers.*.self_attn.q_a_layernorm.weight", "layers.*.attention.q_norm.weight"),
    ("model.layers.*.self_attn.q_b_proj.weight", "layers.*.attention.wq_b.weight"),
    ("model.layers.*.self_attn.kv_a_proj_with_mqa.weight", "layers.*.attention.wkv_a.weight"),
    ("model.layers.*.self_attn.kv_a_layernorm.weight", "layers.*.attention.kv_norm.weight"),
    ("model.layers.*.self_attn.kv_b_proj.weight", "layers.*.attention.wkv_b.weight"),
    ("model.layers.*.mlp.shared_experts.gate_proj.weight", "layers.*.moe.shared_experts.w1.weight"),
    ("model.layers.*.mlp.shared_experts.up_proj.weight", "layers.*.moe.shared_experts.w3.weight"),
    ("model.layers.*.mlp.shared_experts.down_proj.weight", "layers.*.moe.shared_experts.w2.weight"),
    ("model.layers.*.mlp.gate.e_score_correction_bias", "layers.*.moe.expert_bias"),
    ("model.layers.*.mlp.gate.e_score_correction_bias", "layers.*.moe.expert_bias_E"),
    ("model.layers.*.enorm.weight", "layers.*.enorm.weight"),
    ("model.layers.*.hnorm.weight", "layers.*.hnorm.weight"),
    ("model.layers.*.eh_proj.weight", "layers.*.eh_proj.weight"),
    ("model.layers.*.shared_head.norm.weight", "layers.*.mtp_norm.weight"),
)
# Llama 4: dense layers, and layers of experts.
_FEED_FORWARD = "model.layers.*.feed_forward"
_LLAMA4 = (
    *(
        (f"{_FEED_FORWARD}.{part}{hub}.weight", f"layers.*.{here}.{side}.weight")
        for part, here in (("", "feed_forward"), ("shared_expert.", "moe.shared_experts"))
        for side, hub in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj"))
    ),
    (f"{_FEED_FORWARD}.router.weight", "layers.*.moe.router.gate.weight"),
)
_EXPERTS = "layers.*.moe.experts", "layers.*.moe.routed_experts.inner_experts"
_LLAMA4_DOWN = tuple(
    (f"{_FEED_FORWARD}.experts.down_proj", f"{part}.{side}")
    for part, side in zip(_EXPERTS, ("w2", "w2_EDF"), strict=True)
)
_LLAMA4_JOINED = tuple(
    (f"{_FEED_FORWARD}.experts.gate_up_proj", tuple(f"{part}.{side}" for side in sides))
    for part, sides in zip(_EXPERTS, (("w1", "w3"), ("w1_EFD", "w3_EFD")), strict=True)
)


_PROJECTIONS = ("wq", "q_proj"), ("wk", "k_proj"), ("wv", "v_proj")
_INNER = "layers.*.moe.routed_experts.inner_experts"
# Experts of gpt-oss, which both stack: rows and columns are exchanged on the hub.
_GPT_OSS_WEIGHTS = (
    ("model.layers.*.mlp.experts.gate_up_proj", f"{_INNER}.mlp1_weight_EGD"),
    ("model.layers.*.mlp.experts.gate_up_proj", "layers.*.moe.experts.mlp1_weight"),
    ("model.layers.*.mlp.experts.down_proj", f"{_INNER}.mlp2_weight_EDF"),
    ("model.layers.*.mlp.experts.down_proj", "layers.*.moe.experts.mlp2_weight"),
)
_GPT_OSS = (
    *_GPT_OSS_WEIGHTS,
    ("model.layers.*.mlp.experts.gate_up_proj_bias", f"{_INNER}.mlp1_bias_EG"),
    ("model.layers.*.mlp.experts.gate_up_proj_bias", "layers.*.moe.experts.mlp1_bias"),
    ("model.layers.*.mlp.experts.down_proj_bias", f"{_INNER}.mlp2_bias_ED"),
    ("model.layers.*.mlp.experts.down_proj_bias", "layers.*.moe.experts.mlp2_bias"),
    ("model.layers.*.mlp.router.weight", "layers.*.moe.router.gate.weight"),
    ("model.layers.*.mlp.router.bias", "layers.*.moe.router.gate.bias"),
    ("model.layers.*.self_attn.sinks", "layers.*.attention.sinks"),
    ("model.layers.*.self_attn.o_proj.bias", "layers.*.attention.wo.bias"),
    *(
        (f"model.layers.*.self_attn.{hub}.bias", f"layers.*.attention.{part}{here}.bias")
        for here, hub in _PROJECTIONS
        for part in ("qkv_linear.", "")
    ),
)


class Family(Struct, frozen=True):
    """What a model type has of its own: `names` go before `NAMES`; `turns`: queries and keys are
    turned; of the tensors that `exchanged` matches on the hub, rows and columns are exchanged.

    experts: tensors of one expert each on the hub, and those here that stack them. joined: a tensor
    of the hub, and those of torchtitan that it is, exchanged and side by side.
    prefix: what the hub's names have before those here. left_out: what the hub's model has not.
    """

    turns: bool = False
    names: tuple[tuple[str, str], ...] = ()
    exchanged: tuple[str, ...] = ()
    experts: tuple[tuple[str, str], ...] = EXPERTS
    joined: tuple[tuple[str, tuple[str, ...]], ...] = ()
    prefix: str = ""
    left_out: tuple[str, ...] = ()


_LLAMA4_TEXT = Family(
    names=(*_LLAMA4, *_LLAMA4_DOWN),
    exchanged=tuple(hub for hub, _ in _LLAMA4_DOWN),
    experts=(),
    joined=_LLAMA4_JOINED,
    left_out=("layers.*.moe.expert_bias", "layers.*.moe.expert_bias_E"),
)
#: By model type.
FAMILIES = {
    "llama": Family(turns=True),
    "llama4": replace(_LLAMA4_TEXT, prefix="language_model."),
    "llama4_text": _LLAMA4_TEXT,
    "qwen3": Family(),
    "qwen3_moe": Family(),
    "deepseek_v3": Family(names=_DEEPSEEK),
    "gpt_oss": Family(names=_GPT_OSS, exchanged=tuple(hub for hub, _ in _GPT_OSS_WEIGHTS)),
}
# Gate and up.
_SIDES = 2
# Names that every such model has. InternLM2's are like them on the hub.
_SIGNS = ("tok_embeddings.weight", "layers.*.attention.wo.weight")
_HUBS_OWN = "**.attention.wo.weight"


class Translated(Struct, frozen=True):
    """A checkpoint's tensors by the hub's names; `rules` say in words what was done to them.

    `names` does the same to any table of its tensors; None where they have the hub's names.
    """

    entries: Mapping[str, Entry]
    rules: tuple[str, ...] = ()
    names: Translation | None = None


def is_titan(names: Iterable[str], schema: Schema) -> bool:
    """Whether a checkpoint's tensors have torchtitan's or Meta's names, and the base's have not."""
    plain = unwrapped(names)
    if not all(any_contains(plain, (patterns.spelt(sign),)) for sign in _SIGNS):
        return False
    if not all(any(patterns.match(sign, name) is not None for name in plain) for sign in _SIGNS):
        return False
    return all(patterns.match(_HUBS_OWN, name) is None for name in schema.specs)


def translated(entries: Mapping[str, Entry], schema: Schema) -> Translated:
    """The tensors of torchtitan's or Meta's model by the hub's names, with rows in the hub's order.

    Any other checkpoint stays as it is. Raises `UnsupportedError` for a family whose names there
    are not known, `NamesError` where the base's config does not say how many heads there are.
    """
    if not is_titan((name for entry in entries.values() for name in entry.names), schema):
        return Translated(entries)
    config = schema.config
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise UnsupportedError(
            "its tensors have the names of torchtitan or Meta, which reshard knows for "
            f"{', '.join(FAMILIES)}, not for {kind!r}.",
            hint="Export it with torchtitan's own conversion to Hugging Face.",
        )
    family = FAMILIES[kind]
    owners: dict[str, tuple[str, ...]] = {}

    def make(table: Mapping[str, Entry]) -> dict[str, Entry]:
        tensors: dict[str, Entry] = {}
        parts: dict[str, dict[int, tuple[str, Entry]]] = {}
        for own, entry in table.items():
            part = _part(unwrap(entry.spec.name), family)
            if part is not None:
                parts.setdefault(part[0], {})[part[1]] = (own, entry)
                continue
            for name, made in _of(entry, config, family):
                if name in tensors:
                    raise NamesError("two tensors map to it.", tensor=name)
                tensors[name] = made
                owners.setdefault(name, (own,))
        for name, held in parts.items():
            if len(held) < _SIDES:
                continue  # as of every translation: it is made of all of its sources
            tensors[name] = rearrange.concat(
                [rearrange.transpose(held[at][1], 1, 2) for at in range(_SIDES)], 2
            ).renamed(name)
            owners.setdefault(name, tuple(held[at][0] for at in range(_SIDES)))
        tensors |= _copies(tensors, owners, schema)
        return tensors

    stacks = [here for _, here in family.experts]
    check_stacked({unwrap(n): e.spec.shape for n, e in entries.items()}, stacks, len(schema.specs))
    tensors = make(entries)
    _check_joined(entries, tensors, family)
    heads = ("q_proj.weight", "k_proj.weight")
    turned = sum(family.turns and name.endswith(heads) for name in tensors)
    rules = [f"torchtitan's names -> the hub's ({len(entries)})"]
    lost = [n for n in entries if patterns.matches_any(family.left_out, unwrap(n))]
    if lost:
        rules.append(f"left out what the hub's model has not: {listed(lost, 2)}")
    if turned:
        rules.append(f"heads of queries and keys turned for the hub's rotary embeddings ({turned})")
    return Translated(tensors, tuple(rules), Translation(owners, make))


def _part(name: str, family: Family) -> tuple[str, int] | None:
    """The tensor of the hub that one of torchtitan's is a part of, and which part."""
    for hub, parts in family.joined:
        for at, here in enumerate(parts):
            wild = patterns.match(here, name)
            if wild is not None:
                return family.prefix + hub.replace("*", wild[0]), at
    return None


def _check_joined(
    entries: Mapping[str, Entry], tensors: Mapping[str, Entry], family: Family
) -> None:
    """Refuse a checkpoint that holds gate or up alone of what is one tensor on the hub."""
    for entry in entries.values():
        part = _part(unwrap(entry.spec.name), family)
        if part is not None and part[0] not in tensors:
            raise NamesError("the checkpoint holds only a part of it.", tensor=part[0])


def _copies(
    tensors: Mapping[str, Entry], owners: dict[str, tuple[str, ...]], schema: Schema
) -> dict[str, Entry]:
    """The copies of embedding and head that the base's layers for multi-token prediction have,
    where the checkpoint holds such a layer; torchtitan shares them."""
    made = {}
    for name in [name for name in tensors if name.endswith(".eh_proj.weight")]:
        start = name.removesuffix("eh_proj.weight")
        for own, shared in MTP_COPIES.items():
            if start + own in schema.specs and shared in tensors:
                made[start + own] = tensors[shared].renamed(start + own).aliased(())
                owners.setdefault(start + own, owners[shared])
    return made


def _of(entry: Entry, config: Mapping[str, Any], family: Family) -> Iterator[tuple[str, Entry]]:
    """The hub's tensors that one of torchtitan's is."""
    name = _numbered(unwrap(entry.spec.name), config)
    if patterns.matches_any((*LEFT_OUT, *family.left_out), name):
        return
    for hub, here in family.experts:
        wild = patterns.match(here, name)
        if wild is not None and len(entry.spec.shape) == 3:  # [experts, rows, columns]
            for expert in range(entry.spec.shape[0]):
                called = hub.format(wild[0], expert)
                yield called, rearrange.select(entry, expert).renamed(called)
            return
    rules = [(here, hub) for hub, here in (*family.names, *NAMES)]
    hub_name, rule = patterns.rewrite(name, rules)
    if rule is None:
        yield name, replace(entry.renamed(name), aliases=())
        return
    aliases = (patterns.rewrite(unwrap(alias), rules)[0] for alias in entry.aliases)
    called = family.prefix + hub_name
    others = tuple(family.prefix + alias for alias in aliases if alias != hub_name)
    made = replace(entry.renamed(called), aliases=others)
    yield called, reordered(hub_name, made, config, family, turn)


def _numbered(name: str, config: Mapping[str, Any]) -> str:
    """Layers for multi-token prediction by the numbers that they have on the hub."""
    wild = patterns.match("mtp_layers.*.**", name)
    layers = config.get("num_hidden_layers")
    if wild is None or not wild[0].isdecimal() or type(layers) is not int:
        return name
    return f"layers.{layers + int(wild[0])}.{wild[1]}"


def reordered(
    hub: str,
    entry: Entry,
    config: Mapping[str, Any],
    family: Family,
    turning: Callable[[Entry, int], Entry],
) -> Entry:
    """A tensor in the other's order of rows: `turning` is that of queries and keys."""
    if family.turns and hub.endswith("self_attn.q_proj.weight"):
        return turning(entry, number(config, "num_attention_heads"))
    if family.turns and hub.endswith("self_attn.k_proj.weight"):
        return turning(entry, number(config, "num_key_value_heads", "num_attention_heads"))
    if patterns.matches_any(family.exchanged, hub) and len(entry.spec.shape) == 3:
        return rearrange.transpose(entry, 1, 2)
    return entry


def turn(entry: Entry, heads: int) -> Entry:
    """Rows `(head, pair, half)` of queries or keys as rows `(head, half, pair)`.

    A head of four rows, 0 1 2 3, becomes 0 2 1 3. No byte moves: a part of the output is every
    second row of a part of the input.
    """
    rows = entry.spec.shape[0]
    if rows % (2 * heads):
        raise NamesError(f"its {rows} rows are not {heads} heads of pairs.", tensor=entry.spec.name)
    size = rows // heads
    fragments: list[Fragment] = []
    for fragment in rearrange.unflatten(entry).fragments:
        fragments += _turned(fragment, size)
    return replace(entry, fragments=tuple(fragments))


def _turned(fragment: Fragment, size: int) -> Iterator[Fragment]:
    """A part of the input as parts of the output: for each head in it, its even and odd rows."""
    box = fragment.box
    first, count = box.offsets[0], box.sizes[0]
    strides = fragment.strides or contiguous_strides(box.sizes)
    for head in range(first // size, -(-(first + count) // size)):
        low, high = max(first, head * size), min(first + count, (head + 1) * size)
        for half in range(2):
            start = low + (low - head * size + half) % 2
            length = (high - start + 1) // 2
            if length <= 0:
                continue
            tail, sizes = box.offsets[1:], (1, *box.sizes[1:])
            one = rearrange.cut(fragment, Box(box.shape, (start, *tail), sizes))
            place = head * size + half * (size // 2) + (start - head * size) // 2
            yield every_nth(
                one, fragment, Box(box.shape, (place, *tail), (length, *sizes[1:])), strides, 2
            )


def every_nth(
    one: Fragment, of: Fragment, box: Box, strides: tuple[int, ...], step: int
) -> Fragment:
    """Rows of a part, `step` apart, of which `one` is the first, as the elements of `box`."""
    apart = (step * strides[0], *strides[1:])
    span = 1 + sum((n - 1) * s for n, s in zip(box.sizes, apart, strict=True))
    extent = replace(one.extent, nbytes=span * of.dtype.itemsize)
    return Fragment(box, extent, of.dtype, apart)
