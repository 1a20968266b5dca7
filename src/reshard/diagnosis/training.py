"""A training checkpoint as doctor sees it, in any format that reshard reads.

It has weights, but no tokenizer and usually no config. doctor examines what files, names and values
show by themselves; a finding says what it did not examine. With a base the tensors are those that a
conversion would write, by the base's names: layers and experts that a trainer stacks, one by one.

    read -> names onto the base's -> one pass over all weights -> findings
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from shlex import quote

from msgspec import Struct
from msgspec.structs import replace

from reshard.conversion import output_model
from reshard.conversion.base_model import Base
from reshard.conversion.options import ANY_ALPHA, unwritten
from reshard.conversion.quantised import as_numbers
from reshard.core.catalog import Catalog
from reshard.core.findings import Finding
from reshard.core.regex import regex
from reshard.core.tensors import Entry
from reshard.diagnosis.case import pairs_with
from reshard.diagnosis.folder import is_model
from reshard.diagnosis.signs import some
from reshard.errors import FormatError, IncompleteError, NamesError, PlanError, UnsupportedError
from reshard.formats import Selection, locate
from reshard.formats.info import named
from reshard.naming.lora.find import holds_adapters
from reshard.progress import StagedProgress, stage
from reshard.storage.local import Sources
from reshard.transfer import passes
from reshard.transfer.checksums import Ledger
from reshard.transfer.passes import Facts

#: The codes that are found in training checkpoints, in their order; some are of models as well.
CODES = (
    "checkpoint-damaged",
    "names-do-not-fit",
    "weights-not-finite",
    "weights-all-zero",
    "weights-constant",
    "weights-repeated",
    "weights-large",
    "identical-to-base",
    "model-files-unchecked",
)
# The root mean square of a trained matrix is 0.001 to 1 in released models; inputs of norms, which
# are vectors, have more.
_LARGE = 100.0
# Input embeddings and output heads, which a model may tie.
_VOCABULARY = regex(
    r"(?:.*[._])?(?:\w*embed\w*|\w*head|wte|output(?:_layer)?|shared)(?:\.\w*embed\w*|\.head)*"
    r"\.weight"
)
# Of an adapter, what is zero before it is trained.
_UPDATE = regex(r".*\.lora_(?:B|embedding_B)(?:\..+)?")
_EARLIER = "The run diverged: use an earlier checkpoint of it."
_ANOTHER = "They were never filled, or were lost in saving: use another save of the run."


class Examined(Struct, frozen=True):
    """What was found, and what of: the tensors as the files hold them. Sizes are bytes."""

    num_tensors: int
    total_bytes: int
    findings: tuple[Finding, ...]


def examine(
    path: Path,
    base: Base | None,
    selection: Selection,
    sources: Sources,
    *,
    threads: int,
    progress: StagedProgress | None = None,
) -> Examined:
    """Examine the checkpoint at `path`, or the selected one below it.

    Raises `NotFoundError` where there is none, `UnsupportedError` where it is of a kind that is
    not read. What is damaged or missing in it is a finding.
    """
    try:
        catalog = locate.read(path, sources, selection)
    except (FormatError, IncompleteError) as error:
        return Examined(0, 0, (_damaged(error),))
    entries, misfit = _by_base(catalog, base, sources)
    ledger = Ledger(catalog.records)
    findings = [] if misfit is None else [misfit]
    try:
        facts = passes.scan(
            entries.values(),
            sources,
            threads=threads,
            progress=stage(progress, "examining"),
            measures=True,
            ledger=ledger,
        )
        ledger.check(sources)
    except (FormatError, IncompleteError) as error:
        findings.append(_damaged(error))
    else:
        findings += _of_values(facts)
        if base is not None:
            findings += _unchanged(entries, base, sources, threads, progress)
    held = catalog.entries.values()
    return Examined(
        num_tensors=len(catalog.entries),
        total_bytes=sum(entry.spec.nbytes for entry in held),
        findings=(
            *sorted(findings, key=lambda one: CODES.index(one.code)),
            _unchecked(catalog),
            *catalog.findings,
        ),
    )


def _damaged(error: FormatError | IncompleteError) -> Finding:
    return Finding(
        "checkpoint-damaged",
        str(error).removesuffix(f" {error.hint}"),
        fix=error.hint or "Copy the checkpoint again, or use another save.",
    )


def _by_base(
    catalog: Catalog, base: Base | None, sources: Sources
) -> tuple[Mapping[str, Entry], Finding | None]:
    """What a conversion would write, by the base's names; the checkpoint's own tensors where they
    do not fit, with the finding, and where an update would be added to them."""
    own = catalog.of_one_layout()
    if base is None:
        return own, None
    adapted = holds_adapters(catalog.entries)
    root = catalog.origin.root
    options = replace(unwritten(root, root), fill_from_base=adapted, lora=ANY_ALPHA)
    try:
        numbers, _ = as_numbers(catalog, base, options, sources)
        made = output_model.onto(numbers, base, options, sources)
    except (FormatError, IncompleteError, NamesError, PlanError, UnsupportedError) as error:
        advice = (
            "Check that --base is the model that the training started from."
            if error.hint is None
            else ""
        )
        return own, Finding("names-do-not-fit", error.message, fix=error.hint or advice)
    if adapted:
        return own, None
    tables = {"": made.model, **{file.name: file.tensors for file in made.side_files}}
    return {
        tensor.spec.name: tensor.source.renamed(tensor.spec.name)
        for tensors in reversed(tables.values())
        for tensor in tensors
    }, None


def _of_values(tensors: Sequence[Facts]) -> Iterator[Finding]:
    """What one pass over the weights shows."""
    looks = passes.by_value(tensors)
    if looks.not_finite:
        counts = (
            f"{one.name} ({one.special.nan} NaN, {one.special.infinite} infinite of {one.numel})"
            for one in looks.not_finite
        )
        message = f"{len(looks.not_finite)} of {len(tensors)} tensors: {some(counts)}"
        yield Finding("weights-not-finite", message, fix=_EARLIER)
    zero = [one.name for one in looks.zero if not _UPDATE.fullmatch(one.name)]
    if zero:
        message = f"{len(zero)} of {len(tensors)} tensors are zero throughout: {some(zero)}"
        yield Finding("weights-all-zero", message, fix=_ANOTHER)
    constant = [f"{one.name} ({one.value:g})" for one in looks.constant]
    if constant:
        message = f"{len(constant)} of {len(tensors)} tensors: {some(constant)}"
        yield Finding("weights-constant", message, fix=_ANOTHER)
    yield from _repeated(one for one in tensors if one.is_matrix and one.value is None)
    large = [f"{one.name} ({one.rms:.3g})" for one in tensors if one.is_matrix and one.rms > _LARGE]
    if large:
        message = (
            f"{len(large)} of {len(tensors)} tensors, by their root mean square: {some(large)}"
        )
        yield Finding("weights-large", message, fix=_EARLIER)


def _repeated(matrices: Iterable[Facts]) -> Iterator[Finding]:
    """Matrices that hold the same bytes, but for embeddings and heads, which may be tied."""
    alike: defaultdict[tuple[object, ...], list[str]] = defaultdict(list)
    for one in matrices:
        alike[one.shape, one.digest].append(one.name)
    groups = [
        names
        for names in alike.values()
        if len(names) > 1 and not all(map(_VOCABULARY.fullmatch, names))
    ]
    if groups:
        pairs = some(f"{names[0]} = {names[1]}" for names in groups)
        message = f"{sum(map(len, groups))} tensors are equal to others, bit for bit: {pairs}"
        yield Finding("weights-repeated", message)


def _unchanged(
    entries: Mapping[str, Entry],
    base: Base,
    sources: Sources,
    threads: int,
    progress: StagedProgress | None,
) -> Iterator[Finding]:
    """The finding that every tensor is the base's."""
    pairs = pairs_with(base, entries)
    same = passes.same(pairs, sources, threads=threads, progress=stage(progress, "comparing"))
    if same and all(same):
        message = f"all {len(same)} tensors hold the base's values"
        advice = "Nothing was trained, or another checkpoint is meant: name that."
        yield Finding("identical-to-base", message, fix=advice)


def _unchecked(catalog: Catalog) -> Finding:
    """The finding that a model's other files were not looked at, and how to have them looked at."""
    where = quote(str(catalog.origin.root))
    advice = (
        f"To have all of it examined: reshard doctor {where}."
        if is_model(catalog.origin.root)
        else f"Convert it, then examine the output: reshard convert {where} OUT --base HF_DIR; "
        "reshard doctor OUT --base HF_DIR."
    )
    return Finding(
        "model-files-unchecked",
        f"{named(catalog.format).title} was examined: its files, names and weights. Config, "
        "tokenizer and chat template are those of the base that it is converted with, and the "
        "state of an optimizer was not read",
        fix=advice,
    )
