"""The table of families is sound, and its pattern language rewrites both ways."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reshard.naming import NEWEST, Schema, patterns
from reshard.naming.families import FAMILIES
from reshard.naming.layouts import Family, Layout
from tests.naming import tables
from tests.naming.tables import fit

LAYOUTS = [layout for family in FAMILIES for layout in family.layouts]
parts = st.text("abc01_", min_size=1, max_size=3)


def test_a_model_type_has_one_family() -> None:
    types = [name for family in FAMILIES for name in family.model_types]
    assert len(types) == len(set(types))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_types[0])
def test_a_family_starts_with_the_hub_and_follows_the_versions(family: Family) -> None:
    hub = family.layouts[0]
    assert (hub.names, hub.stacked, hub.swapped) == ((), (), ())
    loaded = [layout for layout in family.layouts if layout.since is not None]
    assert loaded[0] is hub
    assert not hub.backbone
    assert any(layout.loads_as(NEWEST) for layout in loaded)
    for backbone in (False, True):
        own = [layout for layout in loaded if layout.backbone == backbone]
        assert sorted(own, key=lambda layout: layout.since or ()) == own


def wildcards(pattern: str) -> tuple[str, ...]:
    """The wildcards of a pattern, in order."""
    return tuple(part for part in pattern.split(".") if part in ("*", "**"))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.title)
def test_both_sides_of_a_rule_have_the_same_wildcards(layout: Layout) -> None:
    for hub, here in layout.names:
        assert wildcards(hub) == wildcards(here)
        assert not any(part.isdigit() for part in f"{hub}.{here}".split("."))
    for stacked in layout.stacked:
        for part in stacked.parts:
            assert wildcards(part) == (*wildcards(stacked.name), "*")


@settings(deadline=None)
@given(st.lists(parts, min_size=1, max_size=3), st.lists(parts, min_size=1, max_size=4))
def test_a_name_is_rewritten_there_and_back(one: list[str], many: list[str]) -> None:
    here, there = "model.*.language.**", "language.*.x.**"
    name = patterns.fill(here, (one[0], ".".join(many)))
    moved, rule = patterns.rewrite(name, [(here, there)])
    assert rule == (here, there)
    assert moved == ".".join(["language", one[0], "x", *many])
    assert patterns.rewrite(moved, [(there, here)])[0] == name


def test_a_pattern_is_of_whole_parts() -> None:
    assert patterns.match("visual.**", "visuals.proj") is None
    assert patterns.match("visual.**", "visual") is None
    assert patterns.match("*.weight", "a.b.weight") is None
    assert patterns.match("model.norm", "modelxnorm") is None


def test_many_experts_in_a_fit() -> None:
    """10,000 names; a search that compared them pair by pair would not end."""
    hub, stacked = {}, {}
    for layer, expert in itertools.product(range(26), range(128)):
        block = f"model.layers.{layer}.mlp.experts"
        for name, shape in (("gate_proj", (3, 2)), ("up_proj", (3, 2)), ("down_proj", (2, 3))):
            hub[f"{block}.{expert}.{name}.weight"] = shape
        stacked[f"{block}.gate_up_proj"] = (128, 6, 2)
        stacked[f"{block}.down_proj"] = (128, 2, 3)
    base = Schema(tables.schema(hub).specs, {"model_type": "qwen3_moe"})
    found = fit(tables.entries(stacked, "module.model."), base)
    assert found.entries.keys() == hub.keys()
    (piece,) = found.entries["model.layers.9.mlp.experts.5.up_proj.weight"].fragments
    assert piece.in_file.file.path == "module.model.model.layers.9.mlp.experts.gate_up_proj"
    assert (piece.extent.offset, piece.extent.nbytes) == ((5 * 12 + 6) * 4, 6 * 4)
