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
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from reshard.naming.layouts import Layout, View
from reshard.naming.schema import bare_layout, views

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

    `names` are the hub's names of the whole model.
    """
    inner = [section for section in config.values() if _is_model(section)]
    return tuple(
        View((*view.layouts, Layout(f"of {part} alone", (0,), names=pairs)))
        for part, pairs in _PARTS
        if any(name.startswith(f"{part}.") for name in names)
        for section in (*inner, {})
        for view in views(section, guess=False)
    )


def _is_model(section: object) -> bool:
    return isinstance(section, Mapping) and "model_type" in section


def likely_prefixes(
    names: Iterable[str], hubs: Iterable[str], config: Mapping[str, Any]
) -> list[str]:
    """The prefixes after which names of the model follow, by the first layer of each layout.

    If one file holds a policy and its reference, both are likely; the most frequent comes first.
    """
    first = [hub for hub in hubs if _is_first(hub)]
    bare = bare_layout(config)
    layouts = [view for whole in views(config) for view in (whole, View((bare, *whole.layouts)))]
    layouts += part_views(config, first)
    known = {view.name_here(hub) for view in layouts for hub in first}
    found = Counter(
        prefix for name in names for prefix, rest in _splits(name) if prefix and rest in known
    )
    most = max(found.values(), default=0)
    return [prefix for prefix, count in found.most_common() if 2 * count >= most]


def _is_first(name: str) -> bool:
    """Whether it is of the first layer, or of none."""
    return all(part == "0" for part in name.split(".") if part.isdecimal())


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """Every way to cut a name into a prefix, with its dot, and the rest."""
    dot = name.find(".")
    while dot >= 0:
        yield name[: dot + 1], name[dot + 1 :]
        dot = name.find(".", dot + 1)
