"""Other places of a model: under an unknown prefix, or as a part of its base.

The search comes here if no prefix and layout that trainers use fits. A part of a composite base can
be trained separately: its language model, or the thinker of an omni model. On disk such a part lies
under a prefix, which the loaded model of the part does not have:

    Gemma 3, Llama 4, Mistral 3     language_model.model.**     model.**      (Gemma3ForCausalLM)
                                    language_model.lm_head.**   lm_head.**
    Qwen3-VL, Qwen3.5               model.language_model.**     model.**      (Qwen3_5ForCausalLM)
                                    lm_head.**                  lm_head.**
    Qwen2.5-Omni, Qwen3-Omni        thinker.**                  **            (...OmniThinker...)

Read off loaded models of transformers 5.23 (`tests/models/test_composite.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from reshard.naming.layouts import Layout, View
from reshard.naming.schema import bare_layout, views

# Prefixes that are likely: models in one checkpoint.
_MOST = 32
# (what a part is called, the pairs of patterns: in the base's files, in the part's module).
_LANGUAGE, _TEXT = "model.language_model", "model.text_model"
_HEAD = ("lm_head.**", "lm_head.**")
_PARTS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    ("language_model", (("language_model.**", "**"),)),
    ("language_model.model", (("language_model.model.**", "**"),)),
    (_LANGUAGE, (_HEAD, (f"{_LANGUAGE}.**", "model.**"))),
    (_LANGUAGE, ((f"{_LANGUAGE}.**", "**"),)),
    (_TEXT, (_HEAD, (f"{_TEXT}.**", "model.**"))),
    (_TEXT, ((f"{_TEXT}.**", "**"),)),
    ("text_model", (("text_model.**", "**"),)),
    ("thinker", (("thinker.**", "**"),)),
    ("thinker.model", (("thinker.model.**", "**"),)),
)


def part_views(config: Mapping[str, Any], names: Collection[str]) -> tuple[View, ...]:
    """The layouts of a part of a composite model that was trained separately.

    `names` are the hub's names of the whole model, or templates of them.
    """
    inner = [section for section in config.values() if _is_model(section)]
    starts = tuple(f"{part}." for part, _ in _PARTS)
    inside = [name for name in names if name.startswith(starts)]
    return tuple(
        View((*view.layouts, Layout(f"of {part} alone", (0,), names=pairs)))
        for part, pairs in _PARTS
        if any(name.startswith(f"{part}.") for name in inside)
        for section in (*inner, {})
        for view in views(section, guess=False)
    )


def _is_model(section: object) -> bool:
    return isinstance(section, Mapping) and "model_type" in section


def likely_prefixes(
    names: Iterable[str],
    first: Iterable[str],
    config: Mapping[str, Any],
    *,
    guess: bool = True,
) -> list[str]:
    """The prefixes after which names of the model follow, by the first layer of each layout.

    If one file holds a policy and its reference, both are likely; the most frequent comes first.
    `first` are the base's names on the hub, of its first layer and outside of the layers. `guess`
    as in `views`.
    """
    listed = tuple(first)
    bare = bare_layout(config)
    every = views(config, guess=guess)
    layouts = [view for whole in every for view in (whole, View((bare, *whole.layouts)))]
    layouts += part_views(config, listed)
    known = {view.name_here(hub) for view in layouts for hub in listed}
    lengths = sorted({name.count(".") + 1 for name in known}, reverse=True)
    found: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        for length in lengths:
            rest = ".".join(parts[-length:])
            if length < len(parts) and rest in known:
                found[name.removesuffix(rest)] += 1
    most = max(found.values(), default=0)
    return [prefix for prefix, count in found.most_common(_MOST) if 2 * count >= most]
