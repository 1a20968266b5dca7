"""Write a new folder in which every finding is repaired.

The tensors pass through an ordinary conversion: fitted onto the base, laid out, streamed, hashed,
read back. This module adds the rest: it keeps the folder's own config and other files, patches them
where a finding says so, and adds the base's files that are missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from reshard.conversion import manifest
from reshard.conversion.base_model import CONFIG, patched_config
from reshard.conversion.dtypes import OutputTensor, choose
from reshard.conversion.execute import carry_out
from reshard.conversion.writing import Writing
from reshard.core.catalog import Origin
from reshard.core.plan import Plan, parse_size
from reshard.core.tensors import Entry, Record
from reshard.diagnosis.case import Case, Rescue
from reshard.diagnosis.signs import CheckResult, Repair
from reshard.errors import VerificationError
from reshard.formats import huggingface
from reshard.naming import NameMap, identity
from reshard.naming.quantised import Numbers
from reshard.naming.schema import says_tied
from reshard.progress import StagedProgress
from reshard.storage.local import Sources
from reshard.transfer.outcome import Outcome
from reshard.transfer.targets import check_space

# As `save_pretrained` of transformers 4 has it.
_MAX_SHARD_SIZE = "5GB"


class _Repaired(Struct, frozen=True):
    """The tensors as they should be, by their right names, and where they were read."""

    entries: Mapping[str, Entry]
    name_map: NameMap
    format: str
    origin: Origin
    records: Sequence[Record]


def write_repaired(
    case: Case,
    results: Sequence[CheckResult],
    output: Path,
    sources: Sources,
    *,
    threads: int,
    check: Callable[[Path], None],
    progress: StagedProgress | None = None,
) -> None:
    """Write `output`, completely or not at all. Every error among the findings must have a repair.

    `check` examines the finished folder before it gets its name, and raises if something is wrong.
    """
    repairs = [each.repair for each in results if each.repair is not None]
    repaired = _repaired(case, repairs)
    dtype = "base" if any(repair.cast or repair.rescued for repair in repairs) else "keep"
    references = {} if case.base is None else case.base.entries
    tensors = choose(list(repaired.entries.items()), references, dtype)
    plan = _plan(case, repairs, repaired, tensors)
    check_space(output, plan.bytes_to_write)

    def render(outcome: Outcome, copied: Mapping[str, str]) -> bytes:
        if outcome.compared and not outcome.changed:
            raise VerificationError("all tensors equal the base's.", path=case.folder.path)
        stated = manifest.Table([item.spec for item in tensors], "", outcome.digests)
        files = manifest.listed(plan, sources, copied)
        return _manifest(repaired, results, dtype, stated, files)

    writing = Writing(threads, progress=progress)
    carry_out(plan, sources, repaired.records, output, writing, render=render, check=check)


def _repaired(case: Case, repairs: Sequence[Repair]) -> _Repaired:
    """The tensors: those of the rescued checkpoint, or the folder's under their right names."""
    rescue, fit, folder = case.rescue, case.fitted.fit, case.folder
    if isinstance(rescue, Rescue):
        catalog = rescue.catalog
        return _Repaired(
            rescue.entries, rescue.name_map, catalog.format, catalog.origin, catalog.records
        )
    if case.base is None or fit is None:
        entries = _renamed(case, repairs)
        fit = NameMap(identity(entries), prefix=case.prefix)
    else:
        entries = dict(case.fitted.entries)
    origin = Origin(folder.path, "torch" if folder.pickled else "safetensors")
    format_ = "torch" if folder.pickled else "huggingface"
    return _Repaired(entries, fit, format_, origin, folder.records)


def _renamed(case: Case, repairs: Sequence[Repair]) -> dict[str, Entry]:
    """The folder's tensors under the names that the findings give, tied names written out.

    Only a head that the config ties is left to the loader.
    """
    renamed = {own: name for repair in repairs for own, name in repair.renamed.items()}
    dropped: set[str | None] = {name for repair in repairs for name in repair.dropped}
    if says_tied(case.folder.settings) and case.vocabulary.equal:
        dropped.add(case.vocabulary.head)
    entries = {}
    for entry in case.folder.entries.values():
        for own in entry.names:
            if own not in dropped:
                name = renamed.get(own, own)
                entries[name] = entry.renamed(name)
    return entries


def _plan(
    case: Case, repairs: Sequence[Repair], repaired: _Repaired, tensors: Sequence[OutputTensor]
) -> Plan:
    slots = [(item.spec, item.source, item.reference) for item in tensors]
    files, index = huggingface.lay_out(slots, parse_size(_MAX_SHARD_SIZE))
    assets = dict(case.folder.assets)
    texts = dict(index)
    for repair in repairs:
        assets.update((asset.name, asset) for asset in repair.assets)
        texts.update(repair.texts)
    config = _config(case, repairs, repaired.name_map)
    if config is not None:
        texts[CONFIG] = config
    kept = tuple(asset for name, asset in assets.items() if name not in texts)
    return Plan(files, tuple(texts.items()), kept)


def _config(case: Case, repairs: Sequence[Repair], name_map: NameMap) -> bytes | None:
    """The config where it is not the folder's as it is."""
    patches = {path: value for repair in repairs for path, value in repair.config.items()}
    if case.base is not None and (case.folder.config is None or isinstance(case.rescue, Rescue)):
        return patched_config(case.base, {**name_map.config_patches, **patches})
    own = case.folder.as_base()
    stated = case.quantisation.stated
    if stated is not None:
        # Every weight is written as a number.
        own = replace(own, quantised=Numbers(own.entries, {}, stated=stated))
    return patched_config(own, patches) if patches or stated is not None else None


def _manifest(
    repaired: _Repaired,
    results: Sequence[CheckResult],
    dtype: str,
    stated: Mapping[str, manifest.Stated],
    files: Mapping[str, manifest.WrittenFile],
) -> bytes:
    options = {
        "to": "hf",
        "dtype": dtype,
        "max_shard_nbytes": parse_size(_MAX_SHARD_SIZE),
        "repaired": [each.finding.code for each in results if each.repair is not None],
    }
    found = repaired.name_map
    names = {
        "prefix": found.prefix,
        "rules": list(found.rules),
        **replace(found.matching, missing=found.matching.filled, filled=()).to_json(),
    }
    return manifest.render(repaired.format, repaired.origin, options, names, stated, {}, files)
