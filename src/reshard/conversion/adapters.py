"""Adapters in a conversion: the config, which is read first, and the values that must be checked.

read config (refuses by name) -> separate the adapters -> how they scale -> fit -> what is left out
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
from msgspec import Struct, field

from reshard.conversion.base_model import Base
from reshard.conversion.options import LoraChoice, Options
from reshard.core.catalog import Catalog
from reshard.core.findings import Finding
from reshard.errors import Lines, NamesError, PlanError, UnsupportedError, listed
from reshard.formats import huggingface
from reshard.naming import NameMap, apply
from reshard.naming.beginnings import heads
from reshard.naming.judge import matched, pattern_of
from reshard.naming.lora import output
from reshard.naming.lora.config import AdapterConfig, ConfigFile, read_near, with_alpha
from reshard.naming.lora.find import Adapter, Separated, is_traced, separate
from reshard.storage.local import Sources
from reshard.storage.paths import is_file, is_folder
from reshard.transfer.reading import equal, read_array, same_values

# Initialisations that PEFT repeats, to the same weights, when it loads the adapter onto the base.
_RECOMPUTED = ("pissa", "olora")
# What PEFT's weights end in.
_WEIGHTS = (".safetensors", ".bin")
# Names shown of a list, and patterns that a hint spells out.
_SHOWN, _PATTERNS = 10, 4
# With at least this share of exact zeros, a part of a trained lora_B is assumed not to be saved.
_ZEROS = 0.5


class Summary(Struct, frozen=True):
    """The adapter that was converted, for the report.

    `alpha` and `scaling` are those of most modules; `scaling` None: it differs with the rank.
    """

    name: str
    ranks: tuple[int, ...]
    alpha: float
    scaling: float | None
    modules: int
    rslora: bool = False

    def __str__(self) -> str:
        ranks = f"rank{'s' * (len(self.ranks) > 1)} {', '.join(map(str, self.ranks))}"
        scaling = "" if self.scaling is None else f", scaling {self.scaling:g}"
        rslora = ", rsLoRA" if self.rslora else ""
        return (
            f"{self.name} ({ranks}, alpha {self.alpha:g}{scaling}{rslora}), {self.modules} modules"
        )


class Adapters(Struct, frozen=True):
    """A checkpoint's adapters, how they scale (None: there are none), and the keys of their
    updates, which two tied tensors share if they have the same update."""

    separated: Separated
    config: AdapterConfig | None = None
    keys: Mapping[str, str] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()


def summary(adapted: Adapters) -> Summary | None:
    """What the report says of the adapters; None where there are none."""
    separated, config = adapted.separated, adapted.config
    if config is None:
        return None
    ranks = separated.ranks
    uniform = len(ranks) == 1 and not config.alphas
    return Summary(
        name=separated.name or "default",
        ranks=ranks,
        alpha=config.alpha,
        scaling=config.scaling("", ranks[0]) if uniform else None,
        modules=len(separated.adapters),
        rslora=config.rslora,
    )


def find(catalog: Catalog, base: Base, options: Options, sources: Sources | None) -> Adapters:
    """Separate a checkpoint's adapters, if their config permits it.

    Raises `UnsupportedError` for what is not merged, by its name, `PlanError` where nothing says
    how they scale or a config is of another run, and what `separate` raises.
    """
    choice = options.lora
    root = catalog.origin.root
    near = choice.config is not None or _is_of_peft(catalog, base)
    file = read_near(root, sources, choice.config) if near and choice.scaling is None else None
    separated = separate(catalog.of_one_layout(), choice.adapter, base.entries)
    if choice.writes_adapter and not separated.adapters:
        raise PlanError(
            f"--lora {choice.mode} needs adapters, but the checkpoint holds none.",
            hint="Leave out --lora.",
        )
    if choice.alone and _is_peft_folder(catalog):
        raise PlanError("it is already an adapter folder.", path=options.source)
    if sources is not None:
        _check_twice(separated, sources)
    if not separated.adapters:
        return Adapters(separated)
    config, findings = _scaling(separated, file, choice)
    if config.init:
        _check_base_held(separated, config, choice)
    if sources is None:
        return Adapters(separated, config, output.keys(separated, None), tuple(findings))
    readable = sources
    keys = output.keys(separated, lambda one, other: equal(one, other, readable))
    if choice.scaling is None:
        findings += _zeros(separated, readable)
    return Adapters(separated, config, keys, tuple(findings))


def _is_of_peft(catalog: Catalog, base: Base) -> bool:
    """Whether an adapter_config.json near the checkpoint is about it."""
    root = catalog.origin.root
    saved = huggingface.is_adapter(root if is_folder(root) else root.parent)
    return saved or is_traced(catalog.names(), base.entries)


def _is_peft_folder(catalog: Catalog) -> bool:
    """Whether the checkpoint is what PEFT's `save_pretrained` wrote."""
    root = catalog.origin.root
    files = [root] if is_file(root) else [root / f"adapter_model{end}" for end in _WEIGHTS]
    return any(file.stem == "adapter_model" and is_file(file) for file in files) and (
        huggingface.is_adapter(files[0].parent)
    )


def _scaling(
    separated: Separated, file: ConfigFile | None, choice: LoraChoice
) -> tuple[AdapterConfig, list[Finding]]:
    """How the adapters scale: as the user says, otherwise as the file says."""
    if choice.scaling is not None:
        return choice.scaling, []
    ranks = ", ".join(map(str, separated.ranks))
    strange = file is not None and not _has_ranks(file.config, separated)
    if strange and file is not None and (file.named or choice.alpha is None):
        stated = sorted({r for r in (file.config.rank, *file.config.ranks.values()) if r})
        own = "Pass the run's own with --adapter-config"
        raise PlanError(
            f"it states rank {', '.join(map(str, stated))}, but the checkpoint's adapters have "
            f"rank {ranks}: it belongs to another run.",
            path=file.path,
            hint=f"{own}." if choice.alpha is not None else f"{own}, or --lora-alpha.",
        )
    said = None if file is None or strange else file.config
    findings = _unknown(said)
    if choice.alpha is not None:
        return with_alpha(said, choice.alpha), findings
    if file is None or said is None:
        raise PlanError(
            f"the checkpoint holds LoRA adapters on {len(separated.adapters)} modules (rank "
            f"{ranks}), but not the alpha they were trained with.",
            hint="Pass --lora-alpha, or --adapter-config with the run's adapter_config.json.",
        )
    _check_alpha(file)
    if not file.named:
        message = f"alpha {said.alpha:g} was taken from {os.path.normpath(file.path)}."
        findings.append(Finding("alpha-from-file", message))
    return said, findings


def _check_alpha(file: ConfigFile) -> None:
    """Refuse an alpha that was unknown when the file was written, or that another file
    contradicts."""
    if not file.config.alpha:
        raise PlanError(
            "it states an alpha of 0, which switches the adapters off: alpha was not known when it "
            "was written.",
            path=file.path,
            hint="Pass --lora-alpha.",
        )
    if file.disputed is not None:
        raise PlanError(
            f"it states alpha {file.config.alpha:g}, but {file.disputed} states another one.",
            path=file.path,
            hint="Pass --lora-alpha.",
        )


def _has_ranks(config: AdapterConfig, separated: Separated) -> bool:
    """Whether the adapters have ranks that the config states, where it states any."""
    stated = {config.rank, *config.ranks.values()}
    return config.rank is None or stated.issuperset(separated.ranks)


def _unknown(config: AdapterConfig | None) -> list[Finding]:
    if config is None or not config.unknown:
        return []
    names = listed(config.unknown, _SHOWN)
    message = f"adapter_config.json has settings that are not known here: {names}."
    return [Finding("adapter-setting-unknown", message)]


def _check_base_held(separated: Separated, config: AdapterConfig, choice: LoraChoice) -> None:
    """Refuse an update of a base that its initialisation changed, without that base."""
    told = (
        f"the adapters were initialised by {config.init}, which changed the weights that they "
        "update"
    )
    if separated.absent:
        again = (
            " Or merge it with PEFT, which computes the same weights again: merge_and_unload()."
            if config.init in _RECOMPUTED
            else ""
        )
        raise UnsupportedError(
            f"{told}; the checkpoint does not hold the changed weights.",
            tensor=min(separated.absent),
            hint=f"Convert a checkpoint of the run that holds all weights.{again}",
        )
    if choice.writes_adapter:
        raise UnsupportedError(
            f"{told}: the adapter alone is not an update of the base.", hint="Pass --lora merge."
        )


def _check_twice(separated: Separated, sources: Sources) -> None:
    """A tensor saved under two names, with PEFT's or a wrapper's parts, must have one value."""
    for one, other in separated.twice:
        if not equal(one, other, sources):
            raise NamesError(
                "two different tensors of the checkpoint have this name once the parts of PEFT "
                "and wrappers are removed.",
                tensor=one.spec.name,
                hint="Load the checkpoint, remove the wrong one of the two, and save it again.",
            )


def _zeros(separated: Separated, sources: Sources) -> list[Finding]:
    """Whether a part of the updates is exact zeros, as if only one rank's part was saved."""
    shares = {m: _share_of_zeros(a, sources) for m, a in separated.adapters.items()}
    if all(share == 1 for share in shares.values()):
        message = f"lora_B is zero in all of {len(shares)} adapters: they change nothing."
        return [Finding("adapter-zero", message)]
    partly = [module for module, share in shares.items() if _ZEROS <= share < 1]
    if 2 * len(partly) < len(shares):
        return []
    message = (
        f"of {len(partly)} of {len(shares)} adapters, half of lora_B or more is exact zeros "
        f"({partly[0]}: {shares[partly[0]]:.0%}): a part of what was trained may not be saved."
    )
    return [Finding("adapter-partly-zero", message, subject=partly[0])]


def _share_of_zeros(adapter: Adapter, sources: Sources) -> float:
    """The share of zeros of the matrix that starts at zero; 0 or 1 for an embedding's, as tokens
    may never occur."""
    values = read_array(adapter.a if adapter.embedding else adapter.b, sources)
    zeros = 1 - np.count_nonzero(values) / max(values.size, 1)
    return float(zeros == 1) if adapter.embedding else float(zeros)


def explained(error: NamesError, separated: Separated) -> NamesError:
    """The error of the fit, which says first what does not fit about the adapters."""
    modules = len(separated.adapters)
    lost = [name for name in error.unexpected if name in separated.absent]
    if lost:
        return NamesError(
            f"{len(lost)} of the {modules} adapted modules have no weight in the base: "
            f"{listed(lost, _SHOWN)}.",
            missing=error.missing,
            unexpected=error.unexpected,
            hint="Check that --base is the model that was trained. Adapters on parameters of a "
            "module (target_parameters) are not merged.",
        )
    if not separated.adapters or len(separated.absent) < modules:
        return error
    return NamesError(
        Lines(
            f"the checkpoint holds LoRA adapters on {modules} modules, but not the weights that "
            f"they update. {error.message[0].upper()}{error.message[1:]}"
        ),
        missing=error.missing,
        unexpected=error.unexpected,
        hint=error.hint,
    )


def check_left_out(
    adapted: Adapters, fit: NameMap, base: Base, options: Options, sources: Sources
) -> list[Finding]:
    """Compare with the base what an adapter leaves out.

    Raises `PlanError` for tensors that differ without `--allow`: they were trained. Beside the
    merged model, which holds them, they are a finding.
    """
    saved = set(adapted.separated.saved)
    different = []
    entries = apply(fit.outputs, adapted.separated.entries)
    for name, entry in entries.items():
        own = fit.origins.get(name, name)
        if own in adapted.separated.absent or not saved.isdisjoint(heads(own)):
            continue
        stored = base.entries.get(fit.tied_to.get(name, name))
        if stored is None or not same_values(entry, stored, sources):
            different.append((name, own))
    if options.lora.mode == "both":
        return _only_in_model([name for name, _ in different])
    trained = [name for name, own in different if not matched((name, own), options.allow)]
    if trained:
        raise PlanError(
            f"{len(trained)} tensors outside the adapter differ from the base's: "
            f"{listed(trained, _SHOWN)}.",
            hint=_hint(trained, len(entries)),
        )
    if not different:
        return []
    message = (
        f"only the adapters are written: {len(different)} other tensors of the checkpoint differ "
        "from the base's and are not written."
    )
    return [Finding("adapters-alone", message)]


def _only_in_model(names: Sequence[str]) -> list[Finding]:
    """The finding on what the merged model holds and the adapter beside it lacks."""
    if not names:
        return []
    message = (
        f"the adapter does not hold {len(names)} tensors that differ from the base's, and the "
        f"merged model does: {listed(names, _SHOWN)}."
    )
    fix = "Use the merged model: the base with the adapter is another one."
    return [Finding("adapters-alone", message, fix=fix)]


def _hint(trained: Sequence[str], num_entries: int) -> str:
    wrong = ""
    if 2 * len(trained) > num_entries:
        wrong = "Check that --base is the model that the training started from. "
    names = " ".join(f"'{pattern_of(name)}'" for name in trained)
    allow = names if len(trained) <= _PATTERNS else "PATTERN ..., where * is any characters"
    return (
        f"{wrong}To write the whole model, pass --lora merge; to leave them out, --allow {allow}."
    )


def check_place(adapted: Adapters, fit: NameMap) -> None:
    """Raises `PlanError` where an adapter updates what neither checkpoint nor base holds."""
    lost: list[str] = output.lost(adapted.separated, fit, adapted.keys)
    if lost:
        raise PlanError(f"adapters on {len(lost)} modules have no place in the base: {lost[0]}.")
