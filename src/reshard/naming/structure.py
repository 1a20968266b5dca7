"""Whether a model's names and shapes are those of its architecture, judged by its config.

The files are read through the layout that they are in (`layouts.py`), and their hub names are
compared with the rows of `architectures.py`, region by region: the language model, each tower, and
the tensors beside them. If a region has no rows, its layers are compared with each other
(`sisters.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, NamedTuple

from msgspec import Struct

from reshard.core.tensors import Shape
from reshard.naming import sisters
from reshard.naming.architectures import (
    COMPOSITES,
    DECODERS,
    SIZES,
    TOWERS,
    Block,
    Composite,
    Decoder,
)
from reshard.naming.layouts import Piece
from reshard.naming.memory import hub_pieces
from reshard.naming.schema import CLASSIFIERS, classes_of, comes_with_base, is_backbone, text_config

Config = Mapping[str, Any]

_GENERATE = ("ForCausalLM", "ForConditionalGeneration")
_BARE = ("Model", "TextModel")
# The last part before `.weight` in a head's name, in known trainers.
_HEAD_PARTS = ("lm_head", "score", "classifier", "v_head", "qa_outputs", "reward", "logit_scale",
               "attnpool")  # fmt: skip
_HEAD_ENDS = ("_head", "_attnpool", "_logit_scale")


class Row(NamedTuple):
    """A tensor of an architecture: see `architectures.py`."""

    name: str
    dims: tuple[str, ...]
    when: str


class Layers(Struct, frozen=True):
    """A wrong number of layers: `have` below `prefix`, while `key` in the config states
    `stated`."""

    prefix: str
    have: int
    stated: int
    key: str


class Structure(Struct, frozen=True):
    """What names and shapes lack and have beyond an architecture. Names are the hub's.

    absent: tensors that every such model has. strange: tensors that no class of it has; `heads` are
    those with a head's name. other: tensor -> its shape, and that of the architecture. parts:
    prefixes of whole parts that are not there. layers: where their number is another. bare: whether
    the names are those of the backbone alone, without the prefix that the class has.
    """

    absent: tuple[str, ...] = ()
    strange: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    other: Mapping[str, tuple[Shape, str]] = {}
    parts: tuple[str, ...] = ()
    layers: tuple[Layers, ...] = ()
    bare: bool = False

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong."""
        return self == Structure(bare=self.bare)


class Region(Struct, frozen=True):
    """A part of a model's names, below `prefix`. `rows` is None where only its layers are known to
    be alike; `layer` are the rows of each of `layers`, a tuple of blocks being one of them."""

    prefix: str
    config: Config
    rows: Block | None = None
    layers: str = ""
    layer: tuple[Block | tuple[Block, ...], ...] = ()
    count: tuple[str, ...] = ()


def examine(
    shapes: Mapping[str, Shape], config: Config, pieces: Mapping[str, Piece] | None = None
) -> Structure:
    """Compare a model's names and shapes, without wrappers' parts, with its architecture.

    `pieces` are the model's `hub_pieces`, where they are at hand.
    """
    pieces = hub_pieces(shapes, config) if pieces is None else pieces
    hub = {name: piece.shape for name, piece in pieces.items() if not comes_with_base(name, config)}
    regions = regions_of(config)
    if regions is None:
        return _alike(hub, config)
    text = regions[0].prefix
    if not any(name.startswith(text) for name in hub):
        hub = {f"model.{name}": shape for name, shape in hub.items()}
    return _Examination(hub, regions, config, _is_bare(shapes, text)).result()


def _is_bare(names: Iterable[str], text: str) -> bool:
    """Whether names are those of the backbone alone: `model.` is not before them."""
    inner = text.removeprefix("model.")
    starts = (f"{inner}embed_tokens.", f"{inner}layers.")
    return inner != text and any(name.startswith(starts) for name in names)


def _alike(names: Mapping[str, Shape], config: Config) -> Structure:
    """What the layers of a model that no table knows show when compared with each other."""
    counted = sisters.uncounted(names, config)
    layers = () if counted is None else (Layers(*counted),)
    return Structure(absent=sisters.absent(names, config), layers=layers)


def regions_of(config: Config) -> list[Region] | None:
    """The parts of a model of this config; None where the tables do not know its class."""
    kind, named = config.get("model_type"), next(iter(classes_of(config)), "")
    if config.get("auto_map"):
        return None
    composite = _of(COMPOSITES, kind)
    if composite is not None:
        return _composed(composite, config) if _is_of(named, composite.stem) else None
    decoder = _of(DECODERS, kind)
    if decoder is None or not _is_of(named, decoder.stem):
        return None
    beside = _beside("", "lm_head.", named, config, decoder.head_bias)
    return [_decoder(decoder, "model.", config), beside]


def _composed(composite: Composite, config: Config) -> list[Region]:
    inner = text_config(config) or config
    decoder = _of(DECODERS, inner.get("model_type"))
    regions = [
        Region(composite.text, inner)
        if decoder is None
        else _decoder(decoder, composite.text, inner)
    ]
    for section, prefix in composite.towers:
        its_config = config.get(section)
        its_config = its_config if isinstance(its_config, Mapping) else {}
        tower = _of(TOWERS, its_config.get("model_type"))
        if tower is None:
            regions.append(Region(prefix, its_config))
        else:
            rows = (tower.outside, tower.layers, (tower.layer,), tower.count)
            regions.append(Region(prefix, its_config, *rows))
    named = next(iter(classes_of(config)))
    return [*regions, _beside(composite.outside, composite.head, named, config)]


def _decoder(decoder: Decoder, prefix: str, config: Config) -> Region:
    rows, layer = decoder.outside, decoder.layer
    return Region(prefix, config, rows, "layers", layer, ("num_hidden_layers",))


def _beside(
    outside: Block, head: str, named: str, config: Config, head_bias: str = "lm_head_bias"
) -> Region:
    """What lies at the top: projectors, and the head that the class has."""
    if named.endswith(_GENERATE):
        outside += f"\n{head}weight - maybe\n{head}bias - {head_bias}\n"
    elif named.endswith(CLASSIFIERS):
        outside += "\nscore.weight -\nscore.bias - maybe\n"
    return Region("", config, outside)


def _of(table: Iterable[Any], kind: object) -> Any:
    return next((row for row in table if kind in row.model_types), None)


def _is_of(named: str, stem: str) -> bool:
    return named in {stem + task for task in (*_GENERATE, *CLASSIFIERS, *_BARE)}


def is_own_class(named: str, config: Config) -> bool:
    """Whether a class is one that transformers has for the config's model type, as the tables know
    it."""
    found = _of(DECODERS, config.get("model_type")) or _of(COMPOSITES, config.get("model_type"))
    return found is not None and _is_of(named, found.stem)


@cache
def rows_of(block: Block) -> tuple[Row, ...]:
    """A block's rows."""
    found = []
    for line in filter(None, map(str.split, block.splitlines())):
        name, *dims = line
        when = dims.pop() if len(dims[-1]) > 1 else ""
        found.append(Row(name, tuple(dims), when))
    return tuple(found)


# Experts of a layer whose names are looked for: a config, and a name, may state a billion.
_MAX_NUMBERED = 1 << 14


class _Examination:
    """One model's names, region by region."""

    def __init__(
        self, names: Mapping[str, Shape], regions: list[Region], config: Config, bare: bool
    ) -> None:
        self._names, self._regions, self._config, self._bare = names, regions, config, bare
        self._absent: list[str] = []
        self._strange: list[str] = []
        self._other: dict[str, tuple[Shape, str]] = {}
        self._parts: list[str] = []
        self._layers: list[Layers] = []

    def result(self) -> Structure:
        held: dict[str, dict[str, Shape]] = {region.prefix: {} for region in self._regions}
        ordered = sorted(held, key=len, reverse=True)
        for name, shape in self._names.items():
            prefix = next(prefix for prefix in ordered if name.startswith(prefix))
            held[prefix][name.removeprefix(prefix)] = shape
        for region in self._regions:
            names = held[region.prefix]
            if not names and region.prefix:
                # Up to transformers 4.51 the backbone class of Qwen2-VL was its language model.
                if not (self._bare and is_backbone(self._config)):
                    self._parts.append(region.prefix)
            elif region.rows is None:
                lost = sisters.absent(names, region.config)
                self._absent += [region.prefix + name for name in lost]
            else:
                self._region(region, names)
        heads = tuple(name for name in self._strange if is_head(name))
        strange = tuple(name for name in self._strange if name not in set(heads))
        return Structure(
            tuple(self._absent), strange, heads, self._other, tuple(self._parts),
            tuple(self._layers), self._bare,
        )  # fmt: skip

    def _region(self, region: Region, names: Mapping[str, Shape]) -> None:
        layers, outside = _by_layer(names, region.layers)
        sizes = _sizes(region.config)
        self._compare(region.prefix, rows_of(region.rows or ""), outside, region.config, sizes)
        self._count(region, layers)
        for index, held in layers.items():
            rows = [row for block in region.layer for row in _chosen(block, held)]
            prefix = f"{region.prefix}{region.layers}.{index}."
            self._compare(prefix, rows, held, region.config, sizes)

    def _count(self, region: Region, layers: Mapping[int, object]) -> None:
        if not region.layers:
            return
        key = next((key for key in region.count if isinstance(region.config.get(key), int)), "")
        stated = region.config[key] if key else max(layers, default=-1) + 1
        # A config may state a billion.
        if len(layers) != stated or not all(0 <= index < stated for index in layers):
            prefix = f"{region.prefix}{region.layers}."
            self._layers.append(Layers(prefix, len(layers), stated, key))

    def _compare(
        self,
        prefix: str,
        rows: Iterable[Row],
        shapes: Mapping[str, Shape],
        config: Config,
        sizes: Mapping[str, int],
    ) -> None:
        known: dict[str, Row] = {}
        for row in rows:
            if not _is_there(row, config):
                continue
            for name in _expanded(row.name, shapes, sizes):
                known[name] = row
                if name not in shapes and row.when != "maybe":
                    self._absent.append(prefix + name)
        for name, shape in shapes.items():
            row_of_it = known.get(name)
            if row_of_it is None:
                self._strange.append(prefix + name)
            elif not _fits(shape, row_of_it.dims, sizes):
                self._other[prefix + name] = (shape, _shown(row_of_it.dims, sizes))


def is_head(name: str) -> bool:
    """Whether a tensor has the name of a head."""
    parts = name.split(".")
    return any(part in _HEAD_PARTS or part.endswith(_HEAD_ENDS) for part in parts)


def _by_layer(
    names: Mapping[str, Shape], layers: str
) -> tuple[dict[int, dict[str, Shape]], dict[str, Shape]]:
    """The names of each layer, by its number, and those outside."""
    found: dict[int, dict[str, Shape]] = {}
    outside: dict[str, Shape] = {}
    start = f"{layers}."
    for name, shape in names.items():
        number, _, rest = name.removeprefix(start).partition(".")
        if layers and name.startswith(start) and number.isdecimal() and rest:
            found.setdefault(int(number), {})[rest] = shape
        else:
            outside[name] = shape
    return dict(sorted(found.items())), outside


def _chosen(block: Block | tuple[Block, ...], shapes: Mapping[str, Shape]) -> tuple[Row, ...]:
    """A block's rows; of several blocks, the one that most of the names fit."""
    if isinstance(block, str):
        return rows_of(block)
    plain = {".".join("*" if p.isdecimal() else p for p in name.split(".")) for name in shapes}
    choices = [rows_of(each) for each in block]
    return max(choices, key=lambda rows: sum(row.name in plain for row in rows))


def _expanded(name: str, shapes: Mapping[str, Shape], sizes: Mapping[str, int]) -> list[str]:
    """The names of a row: one, or one for each expert or other numbered module."""
    if ".*." not in name:
        return [name]
    start, end = name.split("*")
    number = sizes.get("E") if "experts." in start else None
    if number is None:
        numbers = [
            int(found.removeprefix(start).partition(".")[0])
            for found in shapes
            if found.startswith(start) and found.removeprefix(start).partition(".")[0].isdecimal()
        ]
        number = max(numbers, default=-1) + 1
    return [f"{start}{i}{end}" for i in range(min(number, _MAX_NUMBERED))]


def _is_there(row: Row, config: Config) -> bool:
    if row.when in ("", "maybe"):
        return True
    keys = row.when.split("&")
    return all(config.get(key.removesuffix("+"), key.endswith("+")) for key in keys)


def _sizes(config: Config) -> dict[str, int]:
    """The sizes that a config states; those that it leaves to a class's defaults are unknown."""
    found = {}
    for letter, keys in SIZES.items():
        value = next((config[key] for key in keys if isinstance(config.get(key), int)), None)
        if value is not None:
            found[letter] = value
    heads, keys_heads = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if "D" in found and isinstance(heads, int):
        found["Q"] = heads * found["D"]
    if "D" in found and isinstance(keys_heads, int):
        found["K"] = keys_heads * found["D"]
    return found


def _fits(shape: Shape, dims: tuple[str, ...], sizes: Mapping[str, int]) -> bool:
    if dims == ("-",):
        return True
    expected = [int(dim) if dim.isdecimal() else sizes.get(dim) for dim in dims]
    return len(shape) == len(expected) and all(
        size is None or size == have for have, size in zip(shape, expected, strict=True)
    )


def _shown(dims: tuple[str, ...], sizes: Mapping[str, int]) -> str:
    return f"({', '.join(str(sizes.get(dim, dim)) for dim in dims)})"
