"""Checks of the files: what is damaged, what the index says, what is missing beside the weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable

from reshard.conversion.base_model import CONFIG, class_repairs
from reshard.core.catalog import Asset
from reshard.diagnosis.case import Case
from reshard.diagnosis.checks.companions import (
    GENERATION_CONFIG,
    TOKENIZER_CONFIG,
    is_processor,
    is_tokenizer,
    is_vocabulary,
)
from reshard.diagnosis.signs import Repair, Signs, some
from reshard.formats.huggingface import INDEX, SINGLE

_FROM_BASE = "Name the base model with --base to take them from there."


def damaged(case: Case) -> Signs | None:
    """A weight file that breaks the rules of its format."""
    faults = case.folder.damaged
    if not faults:
        return None
    evidence = tuple(f"{file}: {fault}" for file, fault in sorted(faults.items()))
    return Signs(evidence, advice="Copy or download the file again, or convert again.")


def index(case: Case) -> Signs | None:
    """An index that does not say what the files hold."""
    evidence = [*_index_faults(case), *_overlaps(case)]
    if not evidence:
        return None
    folder = case.folder
    lost = sorted((folder.listed or {}).keys() - folder.entries.keys())
    if case.values.conflicts or folder.damaged or (lost and not case.fits):
        return Signs(tuple(evidence), advice="Copy the folder again, with all of its files.")
    words = f"shards and index are rewritten from the {len(folder.entries)} tensors in the files"
    return Signs(tuple(evidence), Repair(words))


def _index_faults(case: Case) -> list[str]:
    folder = case.folder
    if folder.index_fault:
        return [f"{INDEX}: {folder.index_fault}"]
    if folder.listed is None:
        several = len(folder.files) > 1 and not folder.pickled
        return (
            [f"{len(folder.files)} files hold weights, but there is no {INDEX}"] if several else []
        )
    listed: dict[str, set[str]] = {}
    for tensor, file in folder.listed.items():
        listed.setdefault(file, set()).add(tensor)
    faults = []
    for file, tensors in sorted(listed.items()):
        if file in folder.damaged:
            continue
        if file not in folder.files:
            faults.append(f"it lists {len(tensors)} tensors in {file}, which does not exist")
            continue
        absent, extra = tensors - folder.files[file], folder.files[file] - tensors
        if absent:
            faults.append(f"{file} lacks tensors that it lists there: {some(sorted(absent))}")
        if extra:
            faults.append(f"{file} holds tensors that it does not list: {some(sorted(extra))}")
    unlisted = sorted(folder.files.keys() - listed.keys())
    if unlisted:
        faults.append(f"it does not list {some(unlisted)}")
        if SINGLE in unlisted:
            faults.append(f"loaders take {SINGLE} and ignore the index")
    return faults


def _overlaps(case: Case) -> list[str]:
    """Tensors in two files, where those differ; equal ones only waste space."""
    conflicts = case.values.conflicts
    if not conflicts:
        return []
    return [f"{len(conflicts)} tensors are in two files with different values: {some(conflicts)}"]


def pickled(case: Case) -> Signs | None:
    """Weights in torch.save files only."""
    if not case.folder.pickled:
        return None
    evidence = (f"the weights are in {some(sorted(case.folder.files) or case.folder.damaged)}",)
    if case.folder.damaged:
        return Signs(evidence, advice="Copy the file again.")
    return Signs(evidence, Repair("the weights are written as safetensors"))


def config(case: Case) -> Signs | None:
    """No config.json, or one that is not JSON."""
    if case.folder.config is not None:
        return None
    evidence = (f"{CONFIG}: {case.folder.config_fault}",)
    if case.base is None:
        return Signs(evidence, advice="Name the base model with --base to take it from there.")
    return Signs(evidence, Repair("the base's config.json is taken"))


def fsdp_class(case: Case) -> Signs | None:
    """FSDP2's name for a class while it trains, which transformers does not have."""
    repairs = class_repairs(case.folder.settings)
    if not repairs:
        return None
    stated = case.folder.settings["architectures"]
    evidence = (f"{CONFIG} names {', '.join(map(str, stated))}",)
    return Signs(evidence, Repair("the class is named without FSDP", config=repairs))


def tokenizer(case: Case) -> Signs | None:
    """No vocabulary, or one without tokenizer_config.json where the base has that."""
    have, base = case.folder.assets, _base_assets(case)
    expected = any(map(is_vocabulary, base)) if case.base else _speaks(case)
    evidence = []
    if expected and not any(map(is_vocabulary, have)):
        evidence.append("there is no tokenizer.json, tokenizer.model or other vocabulary")
    if TOKENIZER_CONFIG in base and TOKENIZER_CONFIG not in have:
        evidence.append(f"there is no {TOKENIZER_CONFIG}")
    return _from_base(case, evidence, is_tokenizer)


def _speaks(case: Case) -> bool:
    """Whether the config is of a model with a vocabulary."""
    return any("vocab_size" in level for level in case.levels.values())


def processor(case: Case) -> Signs | None:
    """No processor for a model of images or audio."""
    senses = [key for key in ("vision_config", "audio_config") if case.folder.settings.get(key)]
    expected = _has_processor(_base_assets(case)) if case.base else bool(senses)
    if not expected or _has_processor(case.folder.assets):
        return None
    told = f"the config has {' and '.join(senses)}, and " if senses else ""
    evidence = [f"{told}there is no preprocessor_config.json or processor_config.json"]
    return _from_base(case, evidence, is_processor)


def _has_processor(files: Iterable[str]) -> bool:
    return any(is_processor(name, enough=True) for name in files)


def chat_template(case: Case) -> Signs | None:
    """No chat template where the base has one."""
    known = case.companions.base_template
    if known is None or case.companions.template is not None or case.base is None:
        return None
    evidence = (f"the base has one in {known.file}, the folder has none",)
    files = _base_assets(case)
    if known.value is None or known.file not in case.folder.assets:
        # A template inside tokenizer_config.json is copied with it.
        return Signs(
            evidence, Repair(f"the base's {known.file} is taken", assets=(files[known.file],))
        )
    own = {**(case.companions.tokenizer_config or {}), "chat_template": known.value}
    text = json.dumps(own, indent=2, ensure_ascii=False) + "\n"
    words = f"the base's template is written into {TOKENIZER_CONFIG}"
    return Signs(evidence, Repair(words, texts=((TOKENIZER_CONFIG, text.encode()),)))


def generation_config(case: Case) -> Signs | None:
    """No generation_config.json where the base has one."""
    base = _base_assets(case)
    if GENERATION_CONFIG not in base or GENERATION_CONFIG in case.folder.assets:
        return None
    evidence = ["the base has one, the folder has none: end tokens and sampling are guessed"]
    return _from_base(case, evidence, lambda name: name == GENERATION_CONFIG)


def code(case: Case) -> Signs | None:
    """No file for a module that the config's auto_map names."""
    absent = sorted(case.companions.modules - case.folder.assets.keys())
    if not absent:
        return None
    evidence = [f"auto_map in {CONFIG} names code that is not there: {some(absent)}"]
    if not _base_assets(case).keys() >= set(absent):
        return Signs(tuple(evidence), advice="Copy the code from where the model came from.")
    return _from_base(case, evidence, lambda name: name.endswith(".py"))


def _base_assets(case: Case) -> dict[str, Asset]:
    return {asset.name: asset for asset in case.base.assets} if case.base is not None else {}


def _from_base(case: Case, evidence: list[str], belongs: Callable[[str], bool]) -> Signs | None:
    """Signs of missing files; the repair copies the base's files that belong there and are
    missing."""
    if not evidence:
        return None
    taken = tuple(
        asset
        for name, asset in _base_assets(case).items()
        if belongs(name) and name not in case.folder.assets
    )
    if not taken:
        return Signs(tuple(evidence), advice=_FROM_BASE)
    words = f"taken from the base: {some(asset.name for asset in taken)}"
    return Signs(tuple(evidence), Repair(words, assets=taken))
