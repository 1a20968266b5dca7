"""LoRA adapters inside a checkpoint: found by their names, paired, described for merging.

PEFT (0.21: tuners/lora/layer.py, utils/other.py) wraps a module `m` and names its tensors

    m.base_layer.weight          [out, in]   what the base model calls m.weight
    m.lora_A.<adapter>.weight    [r, in]     m.lora_B.<adapter>.weight  [out, r]
    m.lora_magnitude_vector.<adapter>.weight [out]                        DoRA
    m.lora_embedding_A.<adapter> [r, rows]   m.lora_embedding_B.<adapter> [columns, r]
    m.modules_to_save.<adapter>.weight       trained in full: used; m.original_module: dropped

under `base_model.model.`; LightRFT's scalar reward models have the same names in place, without
that prefix. PEFT's `save_pretrained` leaves `<adapter>` out: `m.lora_A.weight`. Neither alpha nor
the kind of scaling is in the tensors: they come from an `adapter_config.json` or from the user, and
are never guessed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from msgspec import Struct, field
from msgspec.structs import replace

from reshard.core.dtypes import FLOAT32
from reshard.core.tensors import Entry, TensorSpec
from reshard.errors import (
    FormatError,
    IncompleteError,
    NamesError,
    PlanError,
    UnsupportedError,
    brief,
)
from reshard.naming.search import unwrap

_ADAPTER_TENSORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B",
                    "lora_magnitude_vector")  # fmt: skip
# PeftModel holds a tuner as `base_model`, which holds the model as `model` (peft/peft_model.py).
_WRAPPED = ".base_model.model."
# No alpha comes near it; an infinite one would make a model of NaNs.
_MAX_ALPHA = 1e9
# The first letters of a name's part -> the method that it gives away.
_REFUSED = {
    "vera_": "VeRA",
    "ia3_l": "IA3",
    "lora_E": "AdaLoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "boft_": "BOFT",
    "trainable_tokens": "trainable tokens",
    "prompt_encoder": "prompt tuning",
}
# Settings of adapter_config.json that change what a merge is.
_REFUSED_SETTINGS = ("layer_replication", "alora_invocation_tokens", "use_qalora", "use_bdlora",
                     "arrow_config", "kasa_config", "target_parameters",
                     "trainable_token_indices", "lora_bias")  # fmt: skip


class AdapterConfig(Struct, frozen=True):
    """How adapters scale. `alphas`: module name suffix -> alpha, where it differs from `alpha`.

    `rank` is the one that all adapters have by it; None where it states none or several.
    """

    alpha: float
    rslora: bool = False
    alphas: Mapping[str, float] = field(default_factory=dict)
    fan_in_fan_out: bool = False
    rank: int | None = None

    def scaling(self, module: str, rank: int) -> float:
        """What `left @ right` is multiplied with: alpha / r, or alpha / sqrt(r) for rsLoRA."""
        alpha = self.alpha
        for suffix, other in self.alphas.items():
            if f".{module}".endswith(f".{suffix}"):
                alpha = other
                break
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def parse_adapter_config(raw: Mapping[str, Any]) -> AdapterConfig:
    """The settings of a parsed `adapter_config.json` that a merge needs.

    Raises `UnsupportedError` for another method than LoRA or a setting that is not handled, and
    `FormatError` for values of the wrong kind.
    """
    method = raw.get("peft_type", "LORA")
    if method != "LORA":
        raise UnsupportedError(f"adapters of type {brief(method)} are not handled, LORA is.")
    for key in _REFUSED_SETTINGS:
        if raw.get(key):
            raise UnsupportedError(f"adapters with {key} = {brief(raw[key])} are not handled.")
    alpha, rank, patterns = raw.get("lora_alpha"), raw.get("r"), raw.get("alpha_pattern") or {}
    numbers = isinstance(patterns, Mapping) and all(map(_is_number, (alpha, *patterns.values())))
    if not numbers:
        shown = f"{brief(alpha)} and alpha_pattern {brief(patterns)}"
        raise FormatError(f"lora_alpha {shown} are no numbers.")
    for pattern in patterns:
        # PEFT takes regular expressions; only plain names are safe to read from a file.
        if not re.fullmatch(r"[\w.]+", pattern):
            raise UnsupportedError(f"the alpha_pattern {brief(pattern)} is no plain module name.")
    return AdapterConfig(
        float(raw["lora_alpha"]),
        rslora=bool(raw.get("use_rslora")),
        alphas={name: float(value) for name, value in patterns.items()},
        fan_in_fan_out=bool(raw.get("fan_in_fan_out")),
        rank=rank if isinstance(rank, int) and not raw.get("rank_pattern") else None,
    )


def _is_number(value: object) -> bool:
    """Whether a scale can be computed with; a NaN is in no range."""
    return isinstance(value, int | float) and -_MAX_ALPHA < value < _MAX_ALPHA


class Adapter(Struct, frozen=True):
    """The tensors of one adapted module, as PEFT keeps them. `embedding`: A and B are its kind."""

    module: str
    a: Entry
    b: Entry
    magnitude: Entry | None = None
    embedding: bool = False

    @property
    def rank(self) -> int:
        return self.a.spec.shape[0]


class Separated(Struct, frozen=True):
    """A checkpoint with its adapters taken off.

    `entries` are the tensors by the names they would have without adapters; `adapters` belong to
    `<module>.weight` among them. `absent` are entries made up for base weights that the
    checkpoint does not hold: they have a shape and no bytes. `saved` are the modules that were
    trained in full (`modules_to_save`).
    """

    entries: Mapping[str, Entry]
    adapters: Mapping[str, Adapter]
    absent: frozenset[str] = frozenset()
    saved: tuple[str, ...] = ()
    name: str = "default"

    @property
    def apart(self) -> frozenset[str]:
        """The names of tensors that were trained apart from what the base ties them to.

        PEFT trains a copy of a module in `modules_to_save`; where it keeps a tie all the same
        (`ensure_weight_tying`), both names are there. A folder of its own, which leaves the
        adapter's name out, holds nothing else beside the adapters.
        """
        if self.adapters and not self.name:
            return frozenset(self.entries.keys() - self.absent)
        return frozenset(f"{module}.weight" for module in self.saved)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The different ranks of the adapters, ascending."""
        return tuple(sorted({adapter.rank for adapter in self.adapters.values()}))


def separate(entries: Mapping[str, Entry], adapter: str | None = None) -> Separated:
    """Take the adapters off a checkpoint; without any, everything stays as it is.

    `adapter` names the one to use where there are several.

    Raises `UnsupportedError` for methods that are not handled, by name; `PlanError` where there
    are several adapters and none was named; `IncompleteError` where A or B is missing.
    """
    return _Separation(entries, adapter).result()


def holds_adapters(entries: Iterable[str]) -> bool:
    """Whether a tensor of an adapter is among the names."""
    return any(part in _ADAPTER_TENSORS for name in entries for part in name.split("."))


def without_peft(name: str) -> str:
    """The name that a tensor has in a model that PEFT does not wrap.

    >>> without_peft("model.base_model.model.lm_head.weight")
    'model.lm_head.weight'
    """
    before, found, after = f".{name}".partition(_WRAPPED)
    return f"{before}.{after}".removeprefix(".") if found else name


class _Separation:
    def __init__(self, entries: Mapping[str, Entry], adapter: str | None) -> None:
        self._tensors: dict[str, dict[str, Entry]] = {}
        self._plain: dict[str, Entry] = {}
        self._saved: dict[str, None] = {}
        self._found: set[str] = set()
        self._wanted = adapter
        for entry in entries.values():
            for name in entry.names:
                self._found.update(_adapter_of(unwrap(name)))
        self._name = self._choose()
        for entry in entries.values():
            self._sort(entry)

    def _choose(self) -> str:
        if self._wanted is not None:
            if self._wanted not in self._found:
                raise PlanError(f"there is no adapter {self._wanted!r}; there are "
                                f"{', '.join(sorted(self._found)) or 'none'}.")  # fmt: skip
            return self._wanted
        if len(self._found) > 1:
            raise PlanError(
                f"the checkpoint holds {len(self._found)} adapters: "
                f"{', '.join(sorted(self._found))}.",
                hint="Name the one to use with --adapter.",
            )
        return next(iter(self._found), "default")

    def _sort(self, entry: Entry) -> None:
        """Put a tensor where it belongs: with its adapter, among the plain names, or nowhere."""
        names = []
        for name in entry.names:
            parts = unwrap(name).split(".")
            _refuse(parts)
            marker = next((part for part in parts if part in _ADAPTER_TENSORS), None)
            if marker is not None:
                at = parts.index(marker)
                adapter, rest = _named(parts[at + 1 :])
                if adapter == self._name:
                    self._add(".".join(parts[:at]), marker, rest, entry)
                continue
            plain = self._plain_name(parts)
            if plain is not None:
                names.append(plain)
        if names:
            self._plain[names[0]] = replace(entry.renamed(names[0]), aliases=tuple(names[1:]))

    def _add(self, module: str, marker: str, rest: list[str], entry: Entry) -> None:
        if rest not in ([], ["weight"]):
            raise UnsupportedError(
                f"adapters with a {'.'.join(rest)} of their own are not handled.",
                tensor=entry.spec.name,
            )
        self._tensors.setdefault(module, {})[marker] = entry

    def _plain_name(self, parts: list[str]) -> str | None:
        """The name that the base model has for it; None for a module that another one replaced."""
        if "original_module" in parts:
            return None
        if "modules_to_save" in parts[:-1]:
            at = parts.index("modules_to_save")
            if parts[at + 1] != self._name:
                return None
            self._saved[".".join(parts[:at])] = None
            parts = parts[:at] + parts[at + 2 :]
        if "base_layer" not in parts:
            return ".".join(parts)
        *module, layer, last = parts
        if layer != "base_layer" or "base_layer" in module or last not in ("weight", "bias"):
            raise UnsupportedError(
                "adapters on parameters of a module (target_parameters) are not handled.",
                tensor=".".join(parts),
            )
        return ".".join((*module, last))

    def result(self) -> Separated:
        adapters = {module: _adapter(module, self._tensors[module]) for module in self._tensors}
        owners = {alias: name for name, e in self._plain.items() for alias in e.aliases}
        absent = set()
        for module, adapter in adapters.items():
            name = f"{module}.weight"
            if name in owners:
                raise UnsupportedError(
                    f"its adapter would also change {owners[name]!r}, which it is tied to.",
                    tensor=name,
                )
            if name not in self._plain:
                spec = TensorSpec(name, FLOAT32, shape_of(adapter))
                self._plain[name] = Entry(spec, (), kind="frozen")
                absent.add(name)
        return Separated(self._plain, adapters, frozenset(absent), tuple(self._saved), self._name)


def _adapter_of(name: str) -> Iterable[str]:
    """The adapter that a tensor belongs to, if it belongs to one."""
    parts = name.split(".")
    for marker in _ADAPTER_TENSORS:
        if marker in parts:
            yield _named(parts[parts.index(marker) + 1 :])[0]
    if "modules_to_save" in parts[:-1]:
        yield parts[parts.index("modules_to_save") + 1]


def _named(rest: list[str]) -> tuple[str, list[str]]:
    """The adapter's name in what follows `lora_A`, and the parts behind it.

    >>> _named(["default", "weight"]), _named(["weight"]), _named([])
    (('default', ['weight']), ('', ['weight']), ('', []))
    """
    return ("", rest) if rest in ([], ["weight"]) else (rest[0], rest[1:])


def _refuse(parts: list[str]) -> None:
    for part in parts:
        for start, method in _REFUSED.items():
            if part.startswith(start):
                raise UnsupportedError(
                    f"adapters of the method {method} are not handled, LoRA and DoRA are.",
                    tensor=".".join(parts),
                    hint="Merge them with PEFT before converting.",
                )


def _adapter(module: str, tensors: Mapping[str, Entry]) -> Adapter:
    embedding = "lora_embedding_A" in tensors or "lora_embedding_B" in tensors
    keys = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    for key in keys:
        if key not in tensors:
            raise IncompleteError("an adapter's tensor is missing.", tensor=f"{module}.{key}")
    a, b = (tensors[key] for key in keys)
    if len(a.spec.shape) != 2 or len(b.spec.shape) != 2:
        raise UnsupportedError(
            f"adapters of shapes {a.spec.shape} and {b.spec.shape} (convolutions) are not handled.",
            tensor=f"{module}.{keys[0]}",
        )
    if a.spec.shape[0] != b.spec.shape[1]:
        raise NamesError(
            f"A is {a.spec.shape}, B is {b.spec.shape}: their ranks differ.",
            tensor=f"{module}.{keys[0]}",
        )
    magnitude = tensors.get("lora_magnitude_vector")
    if magnitude is not None and embedding:
        raise UnsupportedError("DoRA on an embedding is not handled.", tensor=module)
    return Adapter(module, a, b, magnitude, embedding)


def shape_of(adapter: Adapter) -> tuple[int, int]:
    """The shape of the weight that an adapter belongs to (of a linear module or an embedding)."""
    rows, columns = adapter.b.spec.shape[0], adapter.a.spec.shape[1]
    return (columns, rows) if adapter.embedding else (rows, columns)
