"""Checks of the embedding, the output head, and what the config says of them and of dtypes."""

from __future__ import annotations

from reshard.conversion.base_model import dtype_patches
from reshard.core import dtypes
from reshard.core.tensors import main_dtype
from reshard.diagnosis.case import Case
from reshard.diagnosis.signs import Repair, Signs
from reshard.errors import NamesError
from reshard.naming.partners import rows_of
from reshard.naming.schema import classes_of

_TIE = "tie_word_embeddings"
# Ends of the names of classes that have an output head (config.json's `architectures`).
_GENERATING = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")


def head_stored_twice(case: Case) -> Signs | None:
    """A head that is the embedding, stored beside it."""
    vocabulary = case.vocabulary
    stored = vocabulary.head in case.folder.entries
    if case.placeholders or vocabulary.head is None or not (stored and vocabulary.equal):
        return None
    if case.base is None:
        spare = True in _stated_at(case).values()
    else:
        found = case.fitted.fit
        spare = found is not None and case.clean_name(vocabulary.head) in found.matching.tied
    if not spare:
        return None
    evidence = (f"{vocabulary.head} holds the same values as {vocabulary.embedding}",)
    repair = Repair(
        "the head is written once, as the embedding",
        config=_tie_patches(case, tied=True),
        dropped=(vocabulary.head,),
    )
    return Signs(evidence, repair if case.base is None or case.fits else None)


def head_missing(case: Case) -> Signs | None:
    """No head, although the config (or the base) says that it is a separate tensor."""
    if not head_is_lost(case):
        return None
    evidence = [f"{case.vocabulary.embedding} is present, but lm_head.weight is not"]
    if _says_untied(case):
        evidence.append(f"{_TIE} is false: loaders use a random head")
    if case.base is None:
        return Signs(tuple(evidence), advice="Name the base with --base, to see what it ties.")
    if case.fits:
        evidence.append("the base stores no head either: it is the embedding")
        repair = Repair(f"{_TIE} is set to true", config=_tie_patches(case, tied=True))
        return Signs(tuple(evidence), repair)
    evidence.append("the base stores a head")
    return Signs(tuple(evidence), advice="The trained head is not here: convert the run again.")


def head_contradicts_config(case: Case) -> Signs | None:
    """A separate head, although the config says that it is the embedding."""
    vocabulary = case.vocabulary
    if case.placeholders or vocabulary.head is None or vocabulary.equal or rows_disagree(case):
        return None
    stated = _stated_at(case)
    says = [path for path, value in stated.items() if value is True]
    if not says and (stated or not vocabulary.tied_in_base):
        return None
    why = (
        f"config.json has {' and '.join(says)} true"
        if says
        else f"config.json does not state {_TIE}, and the base's head is its embedding"
    )
    evidence = (
        f"{vocabulary.head} differs from {vocabulary.embedding}",
        f"{why}: loaders may drop the head",
    )
    return Signs(evidence, Repair(f"{_TIE} is set to false", config=_tie_patches(case, tied=False)))


def vocabulary_size(case: Case) -> Signs | None:
    """Another number of rows than the config says, or in the head than in the embedding."""
    embedding, head = case.vocabulary.embedding, case.vocabulary.head
    if case.placeholders or embedding is None:
        return None
    shape = None if head is None else case.shape(head)
    found = rows_of(case.shape(embedding), shape, case.folder.settings)
    if found.head is not None:
        evidence = f"{embedding} has {found.rows} rows, {head} has {found.head}"
        return Signs((evidence,), advice="One of them is of another model: convert the run again.")
    if not found.stated:
        return None
    says = ", ".join(f"{path} is {value}" for path, value in found.stated.items())
    return Signs(
        (f"{embedding} has {found.rows} rows, but in config.json {says}",),
        Repair(f"it is set to {found.rows}", config=dict.fromkeys(found.stated, found.rows)),
    )


def tokenizer_size(case: Case) -> Signs | None:
    """A tokenizer with ids that the embedding has no row for."""
    embedding, companions = case.vocabulary.embedding, case.companions
    if case.placeholders or embedding is None or companions.tokens is None:
        return None
    rows = case.shape(embedding)[0]
    if companions.tokens <= rows or companions.tokens == companions.base_tokens:
        return None
    largest = companions.tokens - 1
    evidence = (f"tokenizer.json has ids up to {largest}, but {embedding} has only {rows} rows",)
    return Signs(evidence, advice="Is it another model's tokenizer, or was a resize not saved?")


def dtype(case: Case) -> Signs | None:
    """A dtype in the config that is not the weights'."""
    settings = case.folder.settings
    stated = settings.get("dtype") or settings.get("torch_dtype")
    specs = [entry.spec for entry in case.folder.entries.values()]
    wide = [spec for spec in specs if spec.dtype.floating and spec.dtype.itemsize > 1]
    main, total = main_dtype(wide), sum(spec.numel for spec in wide)
    known = isinstance(stated, str) and stated in {known.name for known in dtypes.ALL}
    if not known or main is None or not total or "quantization_config" in settings:
        return None
    have, most = main.name, sum(spec.numel for spec in wide if spec.dtype == main)
    if have == stated:
        return None
    evidence = (
        f"config.json says {stated}, but {100 * most / total:.0f}% of the weights are {have}",
    )
    of_base = () if case.base is None else (e.spec for e in case.base.entries.values())
    theirs = main_dtype(of_base)
    if theirs is not None and theirs.name == stated:
        return Signs(evidence, Repair(f"the weights are rounded to the base's {stated}", cast=True))
    patches = dtype_patches(case.folder.as_base(), have)
    return Signs(evidence, Repair(f"the config's dtype is set to {have}", config=patches))


def head_is_lost(case: Case) -> bool:
    """Whether a head is missing."""
    vocabulary = case.vocabulary
    if case.placeholders or vocabulary.embedding is None or vocabulary.head is not None:
        return False
    if case.folder.headless or not _generates(case):
        return False
    error = case.fitted.misfit
    if error is None:
        return _says_untied(case) and not _has_another_head(case)
    # Only the head is missing where all the other tensors fit.
    return isinstance(error, NamesError) and case.fitted.fit is not None


def _has_another_head(case: Case) -> bool:
    """Whether some tensor has the embedding's shape: a head by a name that the tables lack."""
    embedding = case.vocabulary.embedding
    if embedding is None:
        return False
    like = [name for name in case.folder.entries if case.shape(name) == case.shape(embedding)]
    return len(like) > 1


def _generates(case: Case) -> bool:
    """Whether the config names a class with an output head, at either level."""
    return any(
        name.endswith(_GENERATING) for level in case.levels.values() for name in classes_of(level)
    )


def rows_disagree(case: Case) -> bool:
    """Whether head and embedding have different numbers of rows."""
    embedding, head = case.vocabulary.embedding, case.vocabulary.head
    if case.placeholders or embedding is None or head is None:
        return False
    return case.shape(embedding)[0] != case.shape(head)[0]


def _says_untied(case: Case) -> bool:
    """The top level decides if it states anything: transformers 5 reads only that."""
    return next(iter(_stated_at(case).values()), True) is False


def _stated_at(case: Case) -> dict[str, bool]:
    """Dotted path of the flag -> its value, top level first."""
    return {
        f"{level}{_TIE}": settings[_TIE]
        for level, settings in case.levels.items()
        if isinstance(settings.get(_TIE), bool)
    }


def _tie_patches(case: Case, *, tied: bool) -> dict[str, object]:
    """What to change in the config so that every reader of it agrees."""
    wrong = {path: tied for path, value in _stated_at(case).items() if value is not tied}
    silent = {} if _TIE in _stated_at(case) else {_TIE: tied}
    return {**silent, **wrong}
