"""Checks of names and shapes: whether users of the folder find the tensors they look for."""

from __future__ import annotations

from collections.abc import Iterator

from reshard.core.tensors import Shape
from reshard.diagnosis.case import Case, Rescue
from reshard.diagnosis.checks.vocabulary import head_is_lost, rows_disagree
from reshard.diagnosis.signs import Repair, Signs, some
from reshard.errors import NamesError
from reshard.naming import patterns
from reshard.naming.families import WRAPPERS
from reshard.naming.layouts import Layout
from reshard.naming.scanning import any_contains
from reshard.naming.schema import family, text_config

_FITTED = "the tensors are written under the base's names"
_WHERE_IT_FAILS = (
    "Such a folder loads in the transformers version that has these names, and fails or starts "
    "with random weights elsewhere."
)
_NAME_BASE = "Name the base model with --base: its files say what the names must be."

# Rules shown as evidence; a vision-language model needs four or five.
_RULES = 6
# The part of a composite model's names under which its language model's lie.
_INNER = "language_model"

# Stacked experts on the hub are [experts, hidden, 2 * intermediate] and [experts, intermediate,
# hidden] in these families (transformers 4.57): the dimension that must be the hidden size.
_STACKED_ON_HUB = ("qwen3_vl_moe", "gpt_oss", "llama4")
_HIDDEN_DIMENSION = (("**.experts.gate_up_proj", 1), ("**.experts.down_proj", 2))


def placeholders(case: Case) -> Signs | None:
    """Tensors without their elements, as ZeRO-3 leaves them in each rank's module."""
    empty = case.placeholders
    if not empty:
        return None
    shapes = [f"{name} {_shown(case.shape(name))}" for name in empty]
    evidence = (f"{len(empty)} of {len(case.folder.entries)} tensors are empty: {some(shapes)}",)
    if isinstance(case.rescue, Rescue):
        origin = case.rescue.catalog.origin
        words = f"the weights are taken from the DeepSpeed checkpoint beside it, tag {origin.tag}"
        return Signs(evidence, Repair(words, rescued=True))
    why = f"{case.rescue}. " if case.rescue else ""
    advice = "The values are not here: convert the run's checkpoint, reshard convert RUN OUT."
    return Signs(evidence, advice=f"{why}{advice}")


def wrapper_prefix(case: Case) -> Signs | None:
    """Parts of names that wrappers or trainers added."""
    wrapped = any_contains(case.folder.entries, WRAPPERS)
    parts = (name.split(".") for name in case.folder.entries) if wrapped else ()
    wrappers = sorted({part for name in parts for part in name} & WRAPPERS)
    evidence = []
    if wrappers:
        evidence.append(f"names contain parts of wrappers: {some(wrappers)}")
    if case.prefix:
        evidence.append(f"all {len(case.folder.entries)} names begin with {case.prefix!r}")
    if not evidence:
        return None
    evidence.append(f"for instance {next(iter(case.folder.entries))}")
    if case.base is not None:
        return Signs(tuple(evidence), Repair(_FITTED) if case.fits else None)
    if len(case.clean) < len(case.folder.entries):
        return Signs(tuple(evidence), advice="Two tensors would get one name. " + _NAME_BASE)
    renamed = {own: clean for clean, own in case.clean.items()}
    return Signs(tuple(evidence), Repair("these parts are removed", renamed=renamed))


def memory_names(case: Case) -> Signs | None:
    """Names of a loaded model of some transformers version where the files have others."""
    if case.base is None:
        return _guessed_memory_names(case)
    fit = case.fitted.fit
    if fit is None:
        return None
    known = {*case.base.entries, *case.fitted.entries, *fit.matching.tied}
    left = frozenset(fit.matching.unexpected)
    strange = [c for c, own in case.clean.items() if c not in known and own not in left]
    if not strange:
        return None
    evidence = (
        f"{len(strange)} of {len(case.clean)} names are not the base's: {some(strange)}",
        *fit.rules[:_RULES],
    )
    return Signs(evidence, Repair(_FITTED) if case.fits else None, _WHERE_IT_FAILS)


def _guessed_memory_names(case: Case) -> Signs | None:
    """By the family of the config's model type alone."""
    for layout, names in _memory_layouts(case):
        here = [pattern for _, pattern in layout.names] + [rule.name for rule in layout.stacked]
        hubs = [pattern for pattern, _ in layout.names]
        found = [
            name
            for name in names
            if patterns.exactness(here, name) > max(patterns.exactness(hubs, name), 0)
        ]
        if found:
            evidence = f"{len(found)} names are those of {layout.title}: {some(found)}"
            return Signs((evidence,), advice=f"{_WHERE_IT_FAILS} {_NAME_BASE}")
    return None


def _memory_layouts(case: Case) -> Iterator[tuple[Layout, list[str]]]:
    """The layouts of loaded models that are not the hub's, newest first, with the names they name.

    A language model inside another has its own family, and its names are those under
    `language_model`.
    """
    settings, names = case.folder.settings, list(case.clean)
    inner = [name for name in names if _INNER in name.split(".")]
    for config, its_names in ((settings, names), (text_config(settings), inner)):
        known = family(config.get("model_type"))
        for layout in reversed(known.layouts[1:] if known else ()):
            if layout.since is not None and not layout.backbone and not _loses_a_part(layout):
                yield layout, its_names


def _loses_a_part(layout: Layout) -> bool:
    """Whether all that a layout does is to leave `vision_model` out of a tower's names: models are
    released under either, and transformers 5.6 and later loads both."""
    return bool(layout.names) and all(
        len(hub.split(".")) > len(here.split(".")) and "vision_model" in hub
        for hub, here in layout.names
    )


def transposed_experts(case: Case) -> Signs | None:
    """Stacked experts whose last two dimensions are exchanged."""
    turned = list(_turned(case) if case.base is not None else _turned_by_config(case))
    if not turned:
        return None
    shapes = (f"{own} is {_shown(have)}, not {_shown(want)}" for own, have, want in turned)
    evidence = (f"{len(turned)} stacked tensors: {some(shapes)}",)
    if case.base is None:
        return Signs(evidence, advice=_NAME_BASE)
    return Signs(evidence, Repair("they are transposed as in the base") if case.fits else None)


def _turned(case: Case) -> Iterator[tuple[str, Shape, Shape]]:
    base = case.base.entries if case.base is not None else {}
    for name, own in case.clean.items():
        if name not in base:
            continue
        have, want = case.shape(own), base[name].spec.shape
        if len(want) == 3 and have != want and have == (want[0], want[2], want[1]):
            yield own, have, want


def _turned_by_config(case: Case) -> Iterator[tuple[str, Shape, Shape]]:
    settings = case.folder.settings
    hidden = (text_config(settings) or settings).get("hidden_size")
    if settings.get("model_type") not in _STACKED_ON_HUB:
        return
    for name, own in case.clean.items():
        for pattern, dimension in _HIDDEN_DIMENSION:
            have = case.shape(own)
            if patterns.match(pattern, name) is None or len(have) != 3:
                continue
            if have[dimension] != hidden and have[3 - dimension] == hidden:
                yield own, have, (have[0], have[2], have[1])


def misfit(case: Case) -> Signs | None:
    """Tensors that are not the base's, where no other check explains it."""
    error = case.fitted.misfit
    if error is None or case.placeholders or head_is_lost(case) or rows_disagree(case):
        return None
    advice = "Did the training start from --base?"
    if not isinstance(error, NamesError) or not (error.missing or error.unexpected):
        return Signs((error.message,), advice=error.hint or advice)
    evidence = []
    if error.missing:
        evidence.append(
            f"{len(error.missing)} of the base's tensors are missing: {some(error.missing)}"
        )
    if error.unexpected:
        evidence.append(
            f"{len(error.unexpected)} tensors are not in the base: {some(error.unexpected)}"
        )
    elif not _of_another_family(case):
        advice = (
            "If they were frozen and left out: reshard convert DIR OUT --base HF_DIR "
            "--fill-from-base."
        )
    return Signs(tuple(evidence), advice=advice)


def _of_another_family(case: Case) -> bool:
    """Whether the base is a model of another type than the folder says that it holds."""
    stated = case.folder.settings.get("model_type")
    return case.base is not None and stated not in (None, case.base.config.get("model_type"))


def _shown(shape: Shape) -> str:
    return f"({', '.join(map(str, shape))})" if len(shape) != 1 else f"[{shape[0]}]"
