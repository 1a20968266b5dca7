"""The output of a conversion: the model, and the files beside it.

    LightRFT actor, GRM     model
    scalar reward model     model (the backbone), reward_head.safetensors, reward_config.json and
                            pytorch_model.bin, the state dict that LightRFT loads strictly
    critic                  model with its head, or model and value_head.safetensors
    LoRA                    model with the updates merged in, and/or an adapter folder

Names and shapes come from the base model's own files; see `reshard.naming`. Only the values that
decide whether two tied tensors are one are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec import Struct, field
from msgspec.structs import replace

from reshard.conversion import adapters
from reshard.conversion.base_model import Base
from reshard.conversion.dtypes import OutputTensor, choose
from reshard.conversion.fitted import Fitted, fitted
from reshard.conversion.options import Options
from reshard.conversion.other_names import by_hub_names
from reshard.conversion.partners import check_head, check_vocabulary
from reshard.conversion.side_files import SideFile, side_files
from reshard.core.catalog import Catalog
from reshard.core.findings import Finding
from reshard.core.state import TrainingState
from reshard.core.tensors import Entry
from reshard.formats.info import output_format
from reshard.naming import FitOptions, Matching, NameMap, Translation, apply, flat, identity
from reshard.naming.backbone import Bare, without_head
from reshard.naming.lora.config import AdapterConfig
from reshard.naming.lora.find import holds_adapters
from reshard.naming.schema import comes_with_base
from reshard.naming.value_heads import SCORE
from reshard.storage.local import Sources

_UNMERGED = Finding(
    "adapters-unmerged",
    "it holds LoRA adapters. reshard writes them unmerged, and no program loads such a file. "
    "With --base, reshard merges them or writes a folder for PEFT.",
)


class OutputModel(Struct, frozen=True):
    """Everything that a conversion writes, by what it is; `name_map` says how the names were found.

    `matching` says what in the end is missing and filled. `patches` change the base's config.
    `merged` counts low-rank updates, which `scaling` scales, and `adapter` describes them for the
    report. With `assets` the base's other files are copied. `loaded_by` is the transformers version
    whose loaded model has the names; None: they are those of the files. Without an output head it
    `generates` nothing. `state` is the training state to write, under the model's names.
    `translation` is what the checkpoint's own names went through before `name_map`, and `trainer`
    what they went through after it, where the names are torchtitan's.
    """

    model: Sequence[OutputTensor]
    name_map: NameMap
    matching: Matching
    side_files: tuple[SideFile, ...] = ()
    texts: tuple[tuple[str, bytes], ...] = ()
    patches: Mapping[str, object] = field(default_factory=dict)
    merged: int = 0
    scaling: AdapterConfig | None = None
    adapter: adapters.Summary | None = None
    findings: tuple[Finding, ...] = ()
    assets: bool = True
    loaded_by: str | None = None
    generates: bool = True
    state: TrainingState | None = None
    translation: Translation | None = None
    trainer: Translation | None = None


def plain(catalog: Catalog, options: Options) -> OutputModel:
    """Without a base: every tensor under the name that it has in the checkpoint."""
    flat.refuse(catalog)
    kept = catalog.of_one_layout()
    if options.exclude_frozen:
        kept = {name: entry for name, entry in kept.items() if entry.kind != "frozen"}
    tied = {alias: name for name, entry in kept.items() for alias in entry.aliases}
    unmerged = output_format(options.to).takes_files and holds_adapters(kept)
    return OutputModel(
        model=choose(list(kept.items()), {}, options.dtype),
        name_map=NameMap(identity(kept)),
        matching=Matching(tuple(n for n in catalog.entries if n not in kept), tied=tied),
        findings=(_UNMERGED,) if unmerged else (),
    )


def onto(catalog: Catalog, base: Base, options: Options, sources: Sources | None) -> OutputModel:
    """With a base: its names, its dtypes, its files.

    Without `sources` no value is read, and tied tensors are assumed to be equal.
    """
    known = by_hub_names(catalog, base)
    made = _output_model(fitted(known.catalog, known.base, options, sources))
    named = replace(made.name_map, rules=(*known.rules, *made.name_map.rules))
    findings = (*known.findings, *made.findings)
    return replace(made, name_map=named, findings=findings, translation=known.names)


def _output_model(fitted: Fitted) -> OutputModel:
    made, matching = _model(fitted)
    files = side_files(fitted)
    _check_head(fitted, made, matching)
    bare = _without_head(fitted)
    released = fitted.base.entries
    # A head that the base stores as its embedding has that one's dtype, and is compared with it.
    ties = {head: released[tie] for head, tie in fitted.name_map.tied_to.items() if tie in released}
    tensors: Sequence[OutputTensor] = choose(
        list(made.items()), {**released, **ties}, fitted.options.dtype
    )
    if fitted.alone or (fitted.parts.rewards and fitted.options.rewards.srm_format == "lightrft"):
        tensors = ()
    patches = {**fitted.name_map.config_patches, **(bare.patches if bare else {})}
    check_vocabulary(tensors, fitted.base, patches)
    if fitted.alone:
        matching = replace(matching, missing=(), filled=())
    return OutputModel(
        model=tensors,
        name_map=fitted.name_map,
        matching=matching,
        side_files=files.side_files,
        texts=files.texts,
        patches=patches,
        merged=len(fitted.updates.by_output) + len(fitted.updates.by_source),
        scaling=fitted.adapters.config,
        adapter=adapters.summary(fitted.adapters),
        findings=(*fitted.findings, *files.findings, *(bare.findings if bare else ())),
        assets=not fitted.alone,
        generates=bare is None,
    )


def _model(fitted: Fitted) -> tuple[dict[str, Entry], Matching]:
    """The model's tensors, with the base's where they are to be filled, and what is missing."""
    options, base, matching = fitted.options, fitted.base, fitted.name_map.matching
    entries, updated = _made(fitted)
    absent = list(matching.filled)
    if options.exclude_frozen:
        frozen = [name for name, entry in entries.items() if entry.kind == "frozen"]
        absent += [name for name in frozen if name not in updated]
        for name in absent:
            entries.pop(name, None)
    if fitted.parts.value is not None and fitted.classes is not None:
        entries.update(fitted.parts.value.called(SCORE))
    filled = [
        name for name in absent if options.fill_from_base or comes_with_base(name, base.config)
    ]
    entries.update((name, base.entries[name]) for name in filled)
    missing = [*matching.missing, *(name for name in absent if name not in filled)]
    for name, source in fitted.name_map.from_base.items():
        if options.fill_from_base:
            entries[name] = base.entries[source].renamed(name)
        (filled if options.fill_from_base else missing).append(name)
    return entries, replace(matching, filled=tuple(filled), missing=tuple(missing))


def _made(fitted: Fitted) -> tuple[dict[str, Entry], set[str]]:
    """The tensors that the checkpoint makes, and the names of those with an update."""
    outputs, updates, backbone = fitted.name_map.outputs, fitted.updates, fitted.parts.backbone
    entries = apply(outputs, backbone)
    updated = {*updates.by_output}
    if updates.by_source:
        with_updates = apply(outputs, {**backbone, **updates.by_source})
        updated |= {n for n, e in with_updates.items() if e.fragments != entries[n].fragments}
        entries = with_updates
    return {**entries, **updates.by_output}, updated


def _check_head(fitted: Fitted, entries: Mapping[str, Entry], matching: Matching) -> None:
    """A tensor that PEFT leaves out was frozen, and a scalar reward model uses no head."""
    known = fitted.separated.adapters or fitted.parts.rewards is not None
    if fitted.alone or fitted.compare is None or known:
        return
    allows = FitOptions(allow=fitted.options.allow).allows
    filled = [name for name in matching.filled if not allows(name)]
    check_head(entries, filled, fitted.base, fitted.compare)


def _without_head(fitted: Fitted) -> Bare | None:
    """What the config must state for a model that is written without its output head."""
    if fitted.alone:
        return None
    return without_head(fitted.base.config, fitted.name_map.matching.missing, fitted.classes)
