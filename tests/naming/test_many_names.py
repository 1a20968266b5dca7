"""40,000 names: how the cost of a fit, and of a refusal, grows with the number of names."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from reshard.core.tensors import Shape
from reshard.errors import NamesError
from reshard.naming import FitOptions, families, fit, sisters
from reshard.naming.judge import Judge
from reshard.naming.layouts import Layout, View
from reshard.naming.mismatch import nearest
from reshard.naming.readings import Below, Names, template_of
from tests import budget
from tests.budget import needs_proc
from tests.naming import tables

Shapes = dict[str, Shape]


def experts(count: int, module: str = "experts", before: str = "model.") -> Iterator[str]:
    """So many names of a mixture of experts."""
    for number in range(count):
        layer, expert = divmod(number // 3, 333)
        part = ("gate_proj", "up_proj", "down_proj")[number % 3]
        yield f"{before}layers.{layer}.mlp.{module}.{expert}.{part}.weight"


_DOTS = ".".join(f"p{number}" for number in range(20))
# A part of each of some families' names, by which a view changes them.
_PARTS = ("visual", "block_sparse_moe", "shared_expert", "language_model", "patch_embed", "W_down")
_Make = Callable[[int], Iterator[str]]


def numbered(form: str) -> _Make:
    """Makes so many names of a format, in which `k` is the number of each."""
    return lambda count: (
        form.format(k=k, square=k * k, group=k % 7, part=_PARTS[k % 6], dots=_DOTS)
        for k in range(count)
    )


#: What a checkpoint and its base are, given the number of names, and whether they fit.
KINDS: dict[str, tuple[_Make, _Make, bool]] = {
    "other modules": (lambda n: experts(n, "specialists"), experts, False),
    "other numbers": (numbered("decoder.block.{k}.weights.{square}"), lambda n: experts(9), False),
    "no number": (numbered("w{k}.weight"), numbered("v{k}.weight"), False),
    "parts of families": (numbered("w{k}.{part}.weight"), numbered("v{k}.{part}.weight"), False),
    "many dots": (numbered("a{group}.c{k}.{dots}"), experts, False),
    "ends alike": (numbered("a{group}.c{k}.{dots}"), numbered("b{group}.c{k}.{dots}"), False),
    "a long beginning": (numbered("p." * 100 + "c{k}.weight"), experts, False),
    "many beginnings": (
        numbered("x{k}.norm.weight"),
        lambda n: iter([*experts(n), "model.norm.weight"]),
        False,
    ),
    "more beside": (
        lambda n: iter([*experts(n * 2 // 3), *(f"extra{k}" for k in range(n // 3))]),
        lambda n: experts(n * 2 // 3),
        False,
    ),
    "a half": (lambda n: experts(n // 2), experts, False),
    "two models": (
        lambda n: (name for part in ("actor.", "ref.") for name in experts(n // 2, before=part)),
        lambda n: experts(n // 2),
        False,
    ),
    "all": (lambda n: experts(n, before="actor."), experts, True),
    "all, without a number": (numbered("v{k}.weight"), numbered("v{k}.weight"), True),
}
CONFIGS: dict[str, dict[str, Any]] = {
    "known": {"model_type": "qwen3_moe"},
    "unknown": {"model_type": "of_ours", "tie_word_embeddings": True},
}


def _refused(kind: str, config: Mapping[str, Any], count: int) -> None:
    """Fit so many names of a kind, and see that it ends as it must."""
    source, base, fits = KINDS[kind]
    entries = tables.entries(dict.fromkeys(source(count), (4,)))
    schema = tables.schema(dict.fromkeys(base(count), (4,)), config)
    if fits:
        assert len(fit(entries, schema).outputs) == count
    else:
        with pytest.raises(NamesError):
            fit(entries, schema)


def _calls(work: Callable[[], object]) -> int:
    """How many calls of functions, Python's and C's, something takes."""
    count = 0

    def counted(_frame: object, event: str, _value: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(counted)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("known", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_twice_the_names_cost_twice_as_much(
    kind: str, known: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of these was above: most with the square of the names, or with their 270 readings."""
    from reshard.naming import ways

    # As of 40,000 names, so that the small trial is made the same way.
    monkeypatch.setattr(ways, "_MAX_VERDICTS", 0)
    monkeypatch.setattr(ways, "_COMPARED", 64)
    monkeypatch.setattr(ways, "_GUESSED", 128)
    _refused(kind, CONFIGS[known], 150)  # what is compiled once
    half, whole = (_calls(partial(_refused, kind, CONFIGS[known], count)) for count in (200, 400))
    assert whole < 2.3 * half, (half, whole)


@pytest.mark.parametrize("known", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_few_readings_are_made(kind: str, known: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an unknown kind there are 270; a checkpoint that fits was read through each."""
    from reshard.naming import ways

    made: list[object] = []
    for owner, name in ((Below, "read"), (Judge, "verdicts")):
        _count(monkeypatch, owner, name, made)
    monkeypatch.setattr(ways, "_MAX_VERDICTS", 0)
    _refused(kind, CONFIGS[known], 300)
    assert len(made) <= 24


def test_a_base_of_many_names_counts_as_a_source_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tensors on a base of 300,000 took 34 s: each pair of readings was judged in full."""
    from reshard.naming import ways

    made: list[object] = []
    _count(monkeypatch, Judge, "verdicts", made)
    monkeypatch.setattr(ways, "_MAX_VERDICTS", 1000)
    entries = tables.entries({"a.weight": (4,), "b.weight": (4,)})
    schema = tables.schema(dict.fromkeys(experts(600), (4,)), CONFIGS["unknown"])
    with pytest.raises(NamesError, match="does not fit"):
        fit(entries, schema)
    assert 0 < len(made) <= 4


def _count(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, made: list[object]) -> None:
    real = getattr(owner, name)

    def counted(*given: Any) -> Any:
        made.append(name)
        return real(*given)

    monkeypatch.setattr(owner, name, counted)


def test_a_prefix_and_a_view_read_a_sample_as_they_read_all() -> None:
    """Effects are worked out for the few names that a layout may change; all others stay."""
    views = [view for config in ({}, {"model_type": "mixtral"}) for view in _views(config)]
    names = [
        f"{before}{part}.{tail}"
        for before in ("", "model.", "model.language_model.", "x.7.")
        for part in (*_PARTS, "layers.3.mlp", "layers.3.block_sparse_moe", "lm_head")
        for tail in ("weight", "experts.gate_up_proj", "gate.weight")
    ]
    for prefix in ("", "model.", "x.7."):
        below = Below(Names(dict.fromkeys(names, (2, 4, 4))), prefix)
        for view in views:
            effects = below.templates.effects(view)
            for name in filter(lambda name: name.startswith(prefix), names):
                rest = template_of(name.removeprefix(prefix))[0]
                expected = view.effect(rest)
                found = effects.of(rest)
                same = found == expected if found else (expected.hub, expected.rules) == (rest, ())
                assert same, (view, rest)


def _views(config: Mapping[str, Any]) -> tuple[View, ...]:
    from reshard.naming.schema import bare_layout, views

    whole = views(config)
    return (*whole, *(View((bare_layout(config), *view.layouts)) for view in whole))


def test_no_layout_spells_out_a_number() -> None:
    """A layout's names are templates: their numbers come from the tensors' names alone."""
    layouts: list[Layout] = [layout for family in families.FAMILIES for layout in family.layouts]
    for layout in layouts:
        every = [name for pair in layout.names for name in pair]
        every += [part for rule in layout.stacked for part in (rule.name, *rule.parts)]
        assert not any(part.isdecimal() for name in every for part in name.split("."))


def test_the_nearest_of_many_names_that_end_alike() -> None:
    names = [f"a.b{number}.{_DOTS}" for number in range(2000)]
    sought = [f"b.b{number}.{_DOTS}" for number in range(10)]
    half, whole = (_calls(lambda: nearest(sought, names[:n])) for n in (1000, 2000))  # noqa: B023
    assert whole < 2.2 * half
    assert nearest([f"a.b7.{_DOTS}"], names) == [f"a.b7.{_DOTS}"]
    assert nearest(["c.d", "x.p1.up"], ["q.e", "x.p2.up", "c.d.f", "up"]) == ["c.d.f", "x.p2.up"]


def test_layers_that_all_differ() -> None:
    layers = [f"layers.{number}.w{number}.weight" for number in range(600)]
    common = [f"layers.{number}.norm.weight" for number in range(600)]
    lost = [*layers, *common[1:]]
    assert sisters.absent(lost, {}) == ()
    assert sisters.absent([*lost, *(f"layers.{n}.w0.weight" for n in range(1, 9))], {}) == (
        "layers.0.norm.weight",
    )
    small = _calls(lambda: sisters.absent(lost[:600], {}))
    assert _calls(lambda: sisters.absent(lost, {})) < 3 * small


def _model(folder: Path, names: Iterator[str], config: Mapping[str, Any]) -> Path:
    """A model folder of bfloat16 numbers, four to a name."""
    folder.mkdir()
    header = {
        name: {"dtype": "BF16", "shape": [4], "data_offsets": [8 * at, 8 * at + 8]}
        for at, name in enumerate(names)
    }
    raw = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + 8 * len(header))
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize("known", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_forty_thousand_names_stay_within_the_budget(kind: str, known: str, tmp_path: Path) -> None:
    source, base, fits = KINDS[kind]
    _model(tmp_path / "source", source(40_000), CONFIGS[known])
    _model(tmp_path / "base", base(40_000), CONFIGS[known])
    seconds, peak, said = budget.run(
        "convert", tmp_path / "source", tmp_path / "out", "--base", tmp_path / "base", "--dry-run"
    )
    assert ("error: " in said) is not fits, said
    assert seconds < budget.SECONDS, seconds
    assert peak < budget.MEMORY, peak // budget.MIB


def test_options_are_no_default_of_these_trials() -> None:
    """A prefix that the user names, and names that may be left over, cost no more."""
    held = {
        **dict.fromkeys(experts(300, before="actor."), (4,)),
        **{f"junk.{k}.w": (1,) for k in range(300)},
    }
    schema = tables.schema(dict.fromkeys(experts(300), (4,)))
    entries = tables.entries(held)
    allowed = fit(entries, schema, options=FitOptions(allow=("junk.*",)))
    chosen = fit(entries, schema, options=FitOptions(prefix="actor"))
    assert allowed.outputs == chosen.outputs
    assert len(allowed.matching.unexpected) == 300
