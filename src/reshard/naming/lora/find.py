"""Find LoRA adapters in a checkpoint by their names, pair them, and describe them for merging.

PEFT (0.21: tuners/lora/layer.py, utils/other.py) wraps a module `m` and names its tensors

    m.base_layer.weight          [out, in]   what the base model calls m.weight
    m.lora_A.<adapter>.weight    [r, in]     m.lora_B.<adapter>.weight  [out, r]
    m.lora_magnitude_vector.<adapter>.weight [out]                        DoRA
    m.lora_embedding_A.<adapter> [r, rows]   m.lora_embedding_B.<adapter> [columns, r]
    m.modules_to_save.<adapter>.weight       trained in full: used; m.original_module: dropped

under `base_model.model.`; LightRFT's scalar reward models have the same names in place, without
that prefix. PEFT's `save_pretrained` leaves `<adapter>` out: `m.lora_A.weight`. The tensors hold
neither alpha nor the kind of scaling: these come from an `adapter_config.json` or from the user,
and are never guessed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from msgspec import Struct
from msgspec.structs import replace

from reshard.core.dtypes import FLOAT32
from reshard.core.tensors import Entry, TensorSpec
from reshard.errors import IncompleteError, NamesError, PlanError, UnsupportedError, listed
from reshard.naming.families import WRAPPERS
from reshard.naming.lora import methods
from reshard.naming.lora.stored import Stored
from reshard.naming.scanning import any_contains
from reshard.naming.search import unwrap, unwrapped

# PeftModel holds a tuner as `base_model`, which holds the model as `model` (peft/peft_model.py).
PREFIX = "base_model.model."
_WRAPPED = f".{PREFIX}"
# Parameters of torch's MultiheadAttention, which PEFT wraps whole.
_ATTENTION = ("in_proj_weight", "in_proj_bias")
_TENSORS = frozenset(methods.TENSORS)


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
    """A checkpoint, and its adapters separately.

    `entries` are the tensors by the names they would have without adapters; `adapters` belong to
    `<module>.weight` among them. `absent` are placeholder entries for base weights that the
    checkpoint lacks: they have a shape and no bytes. `saved` are the modules that were trained in
    full (`modules_to_save`). `twice` are pairs of tensors that are stored for one name and must
    hold the same values.
    """

    entries: Mapping[str, Entry]
    adapters: Mapping[str, Adapter]
    absent: frozenset[str] = frozenset()
    saved: tuple[str, ...] = ()
    name: str = "default"
    twice: tuple[tuple[Entry, Entry], ...] = ()

    @property
    def apart(self) -> frozenset[str]:
        """The names of tensors that were trained separately from the tensors that the base ties
        them to.

        PEFT trains a copy of a module in `modules_to_save`; where it keeps a tie all the same
        (`ensure_weight_tying`), both names are there. A folder of its own, which leaves the
        adapter's name out, holds nothing else beside the adapters and the weights that they update.
        """
        if self.adapters and not self.name:
            held = {f"{module}.weight" for module in self.adapters} - self.absent
            return frozenset(self.entries.keys() - held)
        return self.absent | {f"{module}.weight" for module in self.saved}

    @property
    def ranks(self) -> tuple[int, ...]:
        """The different ranks of the adapters, ascending."""
        return tuple(sorted({adapter.rank for adapter in self.adapters.values()}))


def separate(
    entries: Mapping[str, Entry],
    adapter: str | None = None,
    base: Mapping[str, Entry] | None = None,
) -> Separated:
    """Separate the adapters from a checkpoint; without any, everything stays as it is.

    `adapter` names the one to use where there are several. `base` are the base model's tensors: a
    tensor of the base with an adapter's name (Phi-4-multimodal's own, SAM's `prompt_encoder`) is
    not an adapter, and a weight that the checkpoint lacks has the base's layout.

    Raises `UnsupportedError` for methods that are not supported, by name; `PlanError` where there
    are several adapters and none was named; `IncompleteError` where A or B is missing.
    """
    names = (name for entry in entries.values() for name in entry.names)
    if adapter is None and not any_contains(names, (*methods.SIGNS, PREFIX, *WRAPPERS)):
        return Separated(entries, {})
    return _Separation(entries, adapter, base or {}).result()


def holds_adapters(entries: Iterable[str]) -> bool:
    """Whether a tensor of an adapter is among the names."""
    names = [*entries]
    return any_contains(names, methods.TENSORS) and any(
        part in methods.TENSORS for name in names for part in name.split(".")
    )


def is_traced(names: Iterable[str], base: Iterable[str] = ()) -> bool:
    """Whether PEFT wrapped the model that has these names, by parts that the base's names lack."""
    listed = [*names]
    if not any_contains(listed, _TRACES):
        return False
    own = methods.parts_of(base)
    return any(_is_trace(unwrap(name).split("."), own) for name in listed)


# One of these stands in every name that has a trace of PEFT.
_TRACES = ("lora_", "base_model", *methods.WRAPPING, *methods.PROMPTS)


def _is_trace(parts: list[str], own: frozenset[str]) -> bool:
    first = next((part for part in parts[:-1] if part not in ("model", "policy", "actor")), "")
    found = any(
        (part in methods.WRAPPING or part.startswith("lora_")) and part not in own for part in parts
    )
    return found or first == "base_model" or (parts[0] in methods.PROMPTS and parts[0] not in own)


def without_peft(name: str) -> str:
    """The name that a tensor has in a model that PEFT does not wrap.

    >>> without_peft("model.base_model.model.lm_head.weight")
    'model.lm_head.weight'
    """
    before, found, after = f".{name}".partition(_WRAPPED)
    return f"{before}.{after}".removeprefix(".") if found else name


def name_in_peft(module: str, prefix: str) -> str:
    """The name that a module has in the model that PEFT wrapped; `prefix` is what the fit stripped.

    >>> name_in_peft("model.base_model.model.lm_head", "model.base_model.model.")
    'lm_head'
    """
    _, found, after = f".{module}".partition(_WRAPPED)
    return after if found else module.removeprefix(prefix)


class _AdapterName(NamedTuple):
    """The parts of a tensor's name: `module`, the adapter's tensor, its adapter, what follows."""

    module: str
    tensor: str
    adapter: str
    rest: list[str]


class _Separation:
    def __init__(
        self, entries: Mapping[str, Entry], adapter: str | None, base: Mapping[str, Entry]
    ) -> None:
        self._tensors: dict[str, dict[str, Entry]] = {}
        self._plain: dict[str, Entry] = {}
        self._saved: dict[str, None] = {}
        self._twice: list[tuple[Entry, Entry]] = []
        self._base = base
        self._own = methods.parts_of(base)
        self._own_tails = {_tail(name.split(".")) for name in base} - {""} if self._own else set()
        names = unwrapped(name for entry in entries.values() for name in entry.names)
        self._traced = is_traced(names, base)
        self._found = {found for name in names for found in self._adapters_in(name.split("."))}
        self._name = self._choose(adapter)
        # ms-swift saves what it trained in full (vit.safetensors) without PEFT's prefix.
        wrapped = sum(name.startswith(PREFIX) for name in names)
        self._mixed = not self._name and 0 < wrapped < len(names)
        for entry in entries.values():
            self._sort(entry)

    def _choose(self, name: str | None) -> str:
        if name is not None:
            if name not in self._found:
                raise PlanError(f"there is no adapter {name!r}; there are "
                                f"{listed(sorted(self._found)) or 'none'}.")  # fmt: skip
            return name
        if len(self._found) > 1:
            raise PlanError(
                f"the checkpoint holds {len(self._found)} adapters: {listed(sorted(self._found))}.",
                hint="Name the one to use with --adapter.",
            )
        return next(iter(self._found), "default")

    def _is_own(self, parts: list[str]) -> bool:
        """Whether the base itself has a tensor of this name, although it looks like an
        adapter's."""
        return bool(self._own_tails) and _tail(parts) in self._own_tails

    def _adapters_in(self, parts: list[str]) -> Iterable[str]:
        """The adapter that a tensor belongs to, if it belongs to one."""
        if self._is_own(parts):
            return
        part = _taken_apart(parts)
        if part is not None:
            yield part.adapter
        if "modules_to_save" in parts[:-1]:
            yield _named(parts[parts.index("modules_to_save") + 1 :])[0]

    def _sort(self, entry: Entry) -> None:
        """Assign a tensor to its adapter, to the plain names, or to nothing."""
        names = []
        for name in entry.names:
            parts = unwrap(name.removeprefix(PREFIX) if self._mixed else name).split(".")
            if self._is_own(parts):
                names.append(".".join(parts))
                continue
            if methods.is_of_training(parts):
                continue
            if self._traced:
                _refuse(parts, self._own)
            part = _taken_apart(parts)
            if part is None:
                plain = self._plain_name(parts)
                names += [plain] if plain is not None else []
            elif part.adapter == self._name:
                self._add(part, entry)
        names = list(dict.fromkeys(names))
        if names:
            mine = replace(entry.renamed(names[0]), aliases=tuple(names[1:]))
            if names[0] in self._plain:
                self._twice.append((self._plain[names[0]], mine))
            self._plain[names[0]] = mine

    def _add(self, part: _AdapterName, entry: Entry) -> None:
        if part.rest not in ([], ["weight"]):
            raise UnsupportedError(
                f"adapters with a {'.'.join(part.rest)} of their own are not supported.",
                tensor=entry.spec.name,
                hint=methods.hint(merges=True),
            )
        if "base_layer" in part.module.split(".") and "base_layer" not in self._own:
            raise UnsupportedError(
                "adapters inside a module that has adapters (torch's MultiheadAttention, or "
                "target_parameters) are not supported.",
                tensor=entry.spec.name,
                hint=methods.hint(merges=True),
            )
        self._tensors.setdefault(part.module, {})[part.tensor] = entry

    def _plain_name(self, parts: list[str]) -> str | None:
        """The name that the base model has for it; None for a module that another one replaced."""
        if "original_module" in parts and "original_module" not in self._own:
            return None
        if "modules_to_save" in parts[:-1] and "modules_to_save" not in self._own:
            at = parts.index("modules_to_save")
            adapter, rest = _named(parts[at + 1 :])
            if adapter != self._name:
                return None
            self._saved[".".join(parts[:at])] = None
            parts = parts[:at] + rest
        if "base_layer" not in parts or "base_layer" in self._own:
            return ".".join(parts)
        *module, layer, last = parts
        if layer == "base_layer" and last in _ATTENTION:
            what = "torch's MultiheadAttention"
        elif layer != "base_layer" or "base_layer" in module or last not in ("weight", "bias"):
            what = "parameters of a module (target_parameters)"
        else:
            return ".".join((*module, last))
        raise UnsupportedError(
            f"adapters on {what} are not supported.",
            tensor=".".join(parts),
            hint=methods.hint(merges=True),
        )

    def result(self) -> Separated:
        adapters = {module: _adapter(module, self._tensors[module]) for module in self._tensors}
        names = {f"{module}.weight" for module in adapters}
        entries = {name: e for entry in self._plain.values() for name, e in _split(entry, names)}
        absent = names - entries.keys()
        stored = Stored(self._base) if absent else None
        for module, adapter in adapters.items():
            name = f"{module}.weight"
            if stored is not None and name in absent:
                spec = TensorSpec(name, FLOAT32, stored.shape(name, shape_of(adapter)))
                entries[name] = Entry(spec, (), kind="frozen")
        if adapters and not self._name:
            # If the names lack the adapter's name, everything except the adapters was trained in
            # full, apart from modules of which PEFT's `bias` saved only the bias.
            held = [name.rpartition(".") for name in sorted(entries.keys() - absent)]
            whole = (module for module, _, last in held if last != "bias")
            self._saved.update(dict.fromkeys(m for m in whole if m not in adapters))
        return Separated(
            entries,
            adapters,
            frozenset(absent),
            tuple(self._saved),
            self._name,
            tuple(self._twice),
        )


def _split(entry: Entry, adapted: set[str]) -> Iterable[tuple[str, Entry]]:
    """A tensor under its names; by each alone where an adapter updates it under one of them."""
    if adapted.isdisjoint(entry.names):
        yield entry.spec.name, entry
        return
    for name in entry.names:
        yield name, replace(entry.renamed(name), aliases=())


def _tail(parts: list[str]) -> str:
    """The end of a name, from the part before the first one that PEFT inserted; or empty."""
    at = next((i for i, part in enumerate(parts) if methods.looks_adapted(part)), None)
    return "" if at is None else ".".join(parts[max(at - 1, 0) :])


def _taken_apart(parts: list[str]) -> _AdapterName | None:
    """The name of an adapter's tensor in its parts; None for any other."""
    if _TENSORS.isdisjoint(parts):
        return None
    at = next(i for i, part in enumerate(parts) if part in _TENSORS)
    return _AdapterName(".".join(parts[:at]), parts[at], *_named(parts[at + 1 :]))


def _named(rest: list[str]) -> tuple[str, list[str]]:
    """The adapter's name in what follows `lora_A` or `modules_to_save`, and the parts behind it.

    >>> _named(["default", "weight"]), _named(["weight"]), _named([])
    (('default', ['weight']), ('', ['weight']), ('', []))
    """
    return ("", rest) if rest in ([], ["weight"], ["bias"]) else (rest[0], rest[1:])


def _refuse(parts: list[str], own: frozenset[str]) -> None:
    for part in parts:
        refused = methods.refused_part(part)
        if part not in own and refused is not None:
            title, merges = refused
            raise UnsupportedError(
                f"adapters of the method {title} are not supported; only LoRA and DoRA are.",
                tensor=".".join(parts),
                hint=methods.hint(merges),
            )
    if parts[0] in methods.PROMPTS and parts[0] not in own:
        raise UnsupportedError(
            "adapters of the method prompt tuning are not supported; only LoRA and DoRA are.",
            tensor=".".join(parts),
            hint=methods.hint(merges=False),
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
            f"adapters of shapes {a.spec.shape} and {b.spec.shape} (convolutions) are not "
            "supported.",
            tensor=f"{module}.{keys[0]}",
            # In a grouped convolution, B has only one group's share of A's rows: PEFT cannot merge
            # it.
            hint=methods.hint(merges=a.spec.shape[:1] == b.spec.shape[1:2]),
        )
    if a.spec.shape[0] != b.spec.shape[1]:
        raise NamesError(
            f"A is {a.spec.shape}, B is {b.spec.shape}: their ranks differ.",
            tensor=f"{module}.{keys[0]}",
        )
    return Adapter(module, a, b, tensors.get("lora_magnitude_vector"), embedding)


def shape_of(adapter: Adapter) -> tuple[int, int]:
    """The shape of the weight that an adapter belongs to (of a linear module or an embedding)."""
    rows, columns = adapter.b.spec.shape[0], adapter.a.spec.shape[1]
    return (columns, rows) if adapter.embedding else (rows, columns)
