"""What a checkpoint becomes: the model, and the files beside it.

    LightRFT actor, GRM     model
    scalar reward model     model (the backbone), reward_head.safetensors, reward_config.json and
                            pytorch_model.bin, the state dict that LightRFT loads strictly
    critic                  model with its head, or model and value_head.safetensors
    LoRA                    model with the updates merged in, and/or an adapter folder

Names and shapes come from the base model's own files; see `reshard.naming`. This module reads only
the values that decide whether two tied tensors are one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from msgspec import Struct, field
from msgspec.structs import replace

from reshard.conversion import adapters
from reshard.conversion.base_model import Base, main_dtype
from reshard.conversion.dtypes import Target, choose
from reshard.conversion.modules import take
from reshard.conversion.options import Options
from reshard.conversion.other_names import by_hub_names
from reshard.conversion.partners import check_head, check_vocabulary
from reshard.core.catalog import Catalog
from reshard.core.findings import Finding
from reshard.core.tensors import Entry, Equal
from reshard.errors import NamesError, PlanError
from reshard.formats.info import target_named
from reshard.naming import FitOptions, NameMap, apply, fit, flat, identity
from reshard.naming.backbone import has_head, without_head
from reshard.naming.lora import folder as adapter_files
from reshard.naming.lora.config import AdapterConfig
from reshard.naming.lora.find import holds_adapters, without_peft
from reshard.naming.lora.output import Updates, updates
from reshard.naming.partners import schema_with_ties
from reshard.naming.rewards import (
    REWARD_CONFIG,
    REWARD_HEAD,
    Parts,
    check,
    lightrft_state,
    reward_config,
    split,
)
from reshard.naming.schema import comes_with_base
from reshard.naming.search import unwrap
from reshard.naming.value_heads import SCORE, VALUE_HEAD, classifier
from reshard.storage.local import Sources
from reshard.transfer.reading import equal

LIGHTRFT = "pytorch_model.bin"
# Beside a merged model: in its root, transformers would apply the adapter a second time.
ADAPTER_FOLDER = "adapter/"
_UNMERGED = Finding(
    "adapters-unmerged",
    "it holds LoRA adapters, which are written as they are: no program loads them from such a "
    "file. With --base they are merged, or written as a folder for PEFT.",
)


class Side(Struct, frozen=True):
    """A file beside the model, with tensors of its own."""

    name: str
    targets: Sequence[Target]


class Export(Struct, frozen=True):
    """Everything that a conversion writes, by what it is; `name_map` says how the names were found.

    `missing` are tensors of the base that are not written, `filled` those that are copied from
    it. `patches` change its config. `merged` counts low-rank updates, which `scaling` scales, and
    `adapter` says of them what the report shows. With `assets` the base's other files come along.
    `live` is the transformers version whose live module has the names; None: they are those of the
    files. Without an output head it `generates` nothing.
    """

    model: Sequence[Target]
    name_map: NameMap
    sides: tuple[Side, ...] = ()
    texts: tuple[tuple[str, bytes], ...] = ()
    patches: Mapping[str, object] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    filled: tuple[str, ...] = ()
    merged: int = 0
    scaling: AdapterConfig | None = None
    adapter: adapters.Summary | None = None
    findings: tuple[Finding, ...] = ()
    assets: bool = True
    live: str | None = None
    generates: bool = True


def plain(catalog: Catalog, options: Options) -> Export:
    """Without a base: every tensor under the name that it has in the checkpoint."""
    flat.refuse(catalog)
    kept = {
        name: entry
        for name, entry in catalog.of_one_layout().items()
        if not (options.exclude_frozen and entry.kind == "frozen")
    }
    tied = {alias: name for name, entry in kept.items() for alias in entry.aliases}
    unmerged = target_named(options.to).takes_files and holds_adapters(kept)
    return Export(
        model=choose(list(kept.items()), {}, options.dtype),
        name_map=NameMap(identity(kept), tied=tied),
        missing=tuple(name for name in catalog.entries if name not in kept),
        findings=(_UNMERGED,) if unmerged else (),
    )


def onto(catalog: Catalog, base: Base, options: Options, sources: Sources | None) -> Export:
    """With a base: its names, its dtypes, its files.

    Without `sources` no value is read, and tied tensors are assumed to be equal.
    """
    known = by_hub_names(catalog, base)
    made = _Export(known.catalog, known.base, options, sources).result()
    named = replace(made.name_map, rules=(*known.rules, *made.name_map.rules))
    return replace(made, name_map=named, findings=(*known.findings, *made.findings))


class _Export:
    def __init__(
        self, catalog: Catalog, base: Base, options: Options, sources: Sources | None
    ) -> None:
        self._base = base
        self._options = options
        self._adapters = adapters.find(catalog, base, options, sources)
        self._separated = self._adapters.separated
        self._scaling = self._adapters.config
        self._alone = options.lora.mode == "adapter"
        self._parts = self._split()
        self._classifier = self._as_classifier()
        self._equal = _comparison(sources)
        self._allows = FitOptions(allow=options.allow).allows
        self._fit = self._fitted(self._equal)
        self._findings = list(self._adapters.findings)
        if not self._alone:  # else they are on the model, of which an adapter is not part
            self._findings += self._fit.findings
        self._updates = Updates()
        if self._scaling is not None:
            self._update(self._scaling, sources)

    def _split(self) -> Parts:
        choice = self._options.rewards
        entries, self._modules = take(self._separated.entries, self._base.modules)
        parts = split(
            entries,
            self._base.entries,
            choice.heads.value_head,
            FitOptions(allow=self._options.allow).allows,
        )
        return check(parts, choice.model_type, choice.heads)

    def _as_classifier(self) -> dict[str, object] | None:
        """The config changes of a critic that becomes a sequence classifier."""
        head = self._parts.value
        if head is None:
            return None
        classes = self._base.config.get("architectures") or ()
        return classifier(head, classes, speaks=has_head(self._parts.backbone))

    def _fitted(self, compare: Equal | None) -> NameMap:
        parts = self._parts
        scalar = parts.rewards is not None and not has_head(parts.backbone)
        try:
            return fit(
                parts.backbone,
                schema_with_ties(self._base.schema, self._base.entries, compare),
                options=self._fit_options(scalar),
                equal=compare,
            )
        except NamesError as error:
            raise adapters.explained(error, self._separated) from None

    def _fit_options(self, scalar: bool) -> FitOptions:
        """`scalar`: the checkpoint is of a scalar reward model without an output head."""
        options = self._options
        return FitOptions(
            chosen=options.selection.prefix is not None,
            fill_from_base=options.fill_from_base or options.exclude_frozen or self._alone,
            headless=self._classifier is not None or (scalar and not options.fill_from_base),
            allow=options.allow,
            transformers_version=options.transformers_version,
            untied=self._separated.apart,
            updated=self._adapters.keys,
        )

    def _update(self, scaling: AdapterConfig, sources: Sources | None) -> None:
        """Set what the adapters update or, if only they are written, what is left out."""
        base, options = self._base, self._options
        adapters.check_place(self._adapters, self._fit)
        if not self._alone:
            self._updates = updates(
                self._separated,
                self._fit,
                scaling,
                base.entries,
                keys=self._adapters.keys,
                base_config=base.config,
            )
        written = options.lora.mode in ("adapter", "both")
        if written and sources is not None and options.lora.scaling is None:
            self._findings += adapters.check_left_out(
                self._adapters, self._fit, base, options, sources
            )

    def result(self) -> Export:
        found, alone = self._fit, self._alone
        made, filled, missing = self._model()
        sides, texts = self._reward_files()
        if self._parts.value is not None and (self._classifier is None or alone):
            head = self._parts.value
            sides.append(self._side(VALUE_HEAD, head.called(head.name).values()))
        sides += [] if alone else self._trained_modules()
        if self._scaling is not None and self._options.lora.mode in ("adapter", "both"):
            side, text = self._adapter("" if alone else ADAPTER_FOLDER, self._scaling)
            sides.append(side)
            texts.append(text)
        if sides and not target_named(self._options.to).takes_files:
            raise PlanError(
                f"{sides[0].name} goes beside a Hugging Face model; there is no place for it in "
                f"--to {self._options.to}.",
                hint="Without --base every tensor is kept, under the name that it has.",
            )
        self._check_head(dict(made), filled)
        bare = None if alone else without_head(self._base.config, found.left_out, self._classifier)
        self._findings += bare.findings if bare else ()
        targets: Sequence[Target] = choose(made, self._base.entries, self._options.dtype)
        if alone or (self._parts.rewards and self._options.rewards.srm_format == "lightrft"):
            targets = ()
        patches = {**found.config_patches, **(bare.patches if bare else {})}
        check_vocabulary(targets, self._base, patches)
        return Export(
            model=targets,
            name_map=found,
            sides=tuple(sides),
            texts=tuple(texts),
            patches=patches,
            missing=() if alone else missing,
            filled=() if alone else filled,
            merged=len(self._updates.by_target) + len(self._updates.by_source),
            scaling=self._scaling,
            adapter=adapters.summary(self._adapters),
            findings=tuple(self._findings),
            assets=not alone,
            generates=bare is None,
        )

    def _check_head(self, made: Mapping[str, Entry], filled: Sequence[str]) -> None:
        """A tensor that PEFT leaves out was frozen, and a scalar reward model uses no head."""
        known = self._separated.adapters or self._parts.rewards is not None
        if self._alone or self._equal is None or known:
            return
        check_head(made, [n for n in filled if not self._allows(n)], self._base, self._equal)

    def _model(self) -> tuple[list[tuple[str, Entry]], tuple[str, ...], tuple[str, ...]]:
        """The model's tensors, the names filled from the base, and those left out."""
        options, found = self._options, self._fit
        made, updated = self._made()
        absent = list(found.filled)
        if options.exclude_frozen:
            frozen = [name for name, entry in made.items() if entry.kind == "frozen"]
            absent += [name for name in frozen if name not in updated]
            for name in absent:
                made.pop(name, None)
        if self._parts.value is not None and self._classifier is not None:
            made.update(self._parts.value.called(SCORE))
        filled = [
            name
            for name in absent
            if options.fill_from_base or comes_with_base(name, self._base.config)
        ]
        made.update((name, self._base.entries[name]) for name in filled)
        missing = [*found.left_out, *(name for name in absent if name not in filled)]
        for name, source in found.from_base.items():
            if options.fill_from_base:
                made[name] = self._base.entries[source].renamed(name)
            (filled if options.fill_from_base else missing).append(name)
        return list(made.items()), tuple(filled), tuple(missing)

    def _made(self) -> tuple[dict[str, Entry], set[str]]:
        """The tensors that the checkpoint makes, and the names of those with an update."""
        outputs, updates = self._fit.outputs, self._updates
        made = apply(outputs, self._parts.backbone)
        updated = {*updates.by_target}
        if updates.by_source:
            with_updates = apply(outputs, {**self._parts.backbone, **updates.by_source})
            updated |= {n for n, e in with_updates.items() if e.fragments != made[n].fragments}
            made = with_updates
        return {**made, **updates.by_target}, updated

    def _reward_files(self) -> tuple[list[Side], list[tuple[str, bytes]]]:
        heads, choice = self._parts.rewards, self._options.rewards
        if heads is None:
            return [], []
        config = reward_config(heads, choice.layer, self._base.config)
        if choice.probing_layer is None:
            message = (
                f"the heads are assumed to read hidden state {choice.layer}, LightRFT's default: "
                f"no "
                "checkpoint states the layer."
            )
            self._findings.append(Finding("probing-layer-assumed", message))
        texts = [(REWARD_CONFIG, _json(config))]
        sides = []
        if choice.srm_format in ("split", "both"):
            sides.append(self._side(REWARD_HEAD, heads.tensors.values()))
        if self._alone and choice.srm_format == "lightrft":
            raise PlanError(
                "LightRFT loads a state dict of the whole model, which an adapter alone is not.",
                hint="Pass --lora merge, or --srm-format split.",
            )
        if choice.srm_format in ("lightrft", "both") and not self._alone:
            sides.append(Side(LIGHTRFT, self._lightrft()))
        return sides, texts

    def _lightrft(self) -> list[Target]:
        """LightRFT's own state dict: every name of training, the backbone in the base's dtype.

        PEFT's prefix is removed: the adapters are merged, and LightRFT loads into an unwrapped
        model.
        """
        self._check_complete()
        targets = self._updates.by_target.items()
        merged = {self._fit.origins[name]: made for name, made in targets}
        merged.update(self._updates.by_source)
        heads = self._parts.rewards.tensors if self._parts.rewards else {}
        dtype = (
            main_dtype(self._base).name if self._options.dtype == "base" else self._options.dtype
        )
        backbone: dict[str, Entry] = {}
        for name, entry in lightrft_state(Parts(self._parts.backbone)).items():
            made = merged.get(entry.spec.name, merged.get(name, entry))
            for called in (name, *map(unwrap, entry.aliases)):
                plain = without_peft(called)
                backbone[plain] = made.renamed(plain)
        return [
            *choose(list(backbone.items()), {}, dtype),
            *choose(list(heads.items()), {}, self._kept()),
        ]

    def _check_complete(self) -> None:
        """LightRFT loads strictly: tensors that the checkpoint lacks have no training name here."""
        trained = has_head(self._parts.backbone)
        lacking = [
            name for name in self._fit.filled if trained or not name.endswith("lm_head.weight")
        ]
        if lacking:
            raise PlanError(
                f"the checkpoint lacks {len(lacking)} tensors of the state dict that LightRFT "
                f"loads strictly, {lacking[0]!r} among them.",
                hint="Pass --srm-format split.",
            )

    def _trained_modules(self) -> list[Side]:
        """The weights of the base's modules in sub-folders, in the dtypes that the base has."""
        sides = []
        for module in self._base.modules:
            held = self._modules.get(module.file)
            if held is not None:
                found = choose(list(held.items()), module.tensors, self._options.dtype)
                sides.append(Side(module.file, found))
            elif target_named(self._options.to).takes_files:
                message = f"{module.folder} is the base's: the checkpoint holds no tensor of it."
                self._findings.append(Finding("module-from-base", message, subject=module.folder))
        return sides

    def _adapter(self, folder: str, scaling: AdapterConfig) -> tuple[Side, tuple[str, bytes]]:
        base = self._base
        names = adapter_files.named(scaling, base.folder, base.config)
        found = adapter_files.adapter_folder(self._separated, self._fit.prefix, scaling, names)
        self._findings += adapter_files.findings(found.config, self._separated.ranks)
        side = self._side(folder + adapter_files.WEIGHTS, found.tensors.values())
        return side, (folder + adapter_files.CONFIG, _json(found.config))

    def _side(self, name: str, entries: Iterable[Entry]) -> Side:
        items = [(entry.spec.name, entry) for entry in entries]
        return Side(name, choose(items, {}, self._kept()))

    def _kept(self) -> str:
        """The dtype of tensors that the base lacks: as stored, unless `--dtype` names one."""
        return "keep" if self._options.dtype == "base" else self._options.dtype


def _comparison(sources: Sources | None) -> Equal | None:
    if sources is None:
        return None
    return lambda one, other: equal(one, other, sources)


def _json(value: Mapping[str, object]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
