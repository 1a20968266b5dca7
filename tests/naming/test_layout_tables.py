"""Every family, in every layout that a loaded model has had, fits the files of released models."""

from __future__ import annotations

import pytest

from reshard.core.tensors import Entry
from reshard.errors import NamesError
from reshard.naming import FitOptions, Schema
from tests.naming import tables
from tests.naming.tables import fit

EVERY = [(version, name) for version in tables.VERSIONS for name in tables.names(version)]
# Under 4.51 the class has no vision tower, so what it trained is no whole model of the family.
TEXT_ONLY = ("4.51", "qwen2_5_vl_backbone")


def equal(one: Entry, other: Entry) -> bool:
    """The models of the tables that tie share the values; the others are never compared."""
    return one.spec.shape == other.spec.shape


@pytest.mark.heavy
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "actor.model._orig_mod."])
@pytest.mark.parametrize(("version", "name"), EVERY)
def test_memory_fits_what_the_same_version_saves(version: str, name: str, prefix: str) -> None:
    table = tables.table(version, name)
    found = fit(tables.entries(table.memory, prefix), table.schema(), equal=equal)
    assert {key: entry.spec.shape for key, entry in found.entries.items()} == table.disk_shapes()
    assert not found.matching.filled
    assert not found.matching.unexpected
    for key, origin in table.disk.items():
        if isinstance(origin, str):
            assert tables.origin(found.entries[key]) == prefix + origin


@pytest.mark.parametrize("version", tables.VERSIONS)
@pytest.mark.parametrize("name", tables.names("4.57"))
def test_memory_fits_released_files(version: str, name: str) -> None:
    if name not in tables.names(version) or (version, name) == TEXT_ONLY:
        pytest.skip(f"transformers {version} has no such model")
    memory, hub = tables.table(version, name), tables.table("4.57", name)
    found = fit(tables.entries(memory.memory), hub.schema(), equal=equal)
    assert {key: entry.spec.shape for key, entry in found.entries.items()} == hub.disk_shapes()
    for key, origin in memory.disk.items():
        if isinstance(origin, str) and key in hub.disk and not swapped(name, key):
            assert tables.origin(found.entries[key]) == origin


def swapped(name: str, key: str) -> bool:
    return name == "qwen3_vl_moe" and "experts" in key


@pytest.mark.heavy
@pytest.mark.parametrize("name", tables.names("4.57"))
def test_files_of_one_layout_fit_files_of_another(name: str) -> None:
    hub, late = tables.table("4.57", name), tables.table("5.23", name)
    for source, base in ((hub, late), (late, hub)):
        found = fit(tables.entries(source.disk_shapes()), base.schema(), equal=equal)
        assert found.entries.keys() == base.disk.keys()


@pytest.mark.heavy
@pytest.mark.parametrize("name", tables.names("4.57"))
def test_without_a_config_names_and_shapes_suffice(name: str) -> None:
    if name in ("llava_next_mixtral", "internvl_moe"):
        pytest.skip("what model lies inside another is read from the config alone")
    hub, memory = tables.table("4.57", name), tables.table("5.23", name).memory
    base = Schema(hub.schema().specs)
    assert fit(tables.entries(memory), base, equal=equal).entries.keys() == hub.disk.keys()


def test_a_square_stack_needs_the_version() -> None:
    shapes = {"model.language_model.layers.0.mlp.experts.down_proj": (3, 8, 8),
              "model.language_model.norm.weight": (8,)}  # fmt: skip
    base = tables.schema(shapes, {"model_type": "qwen3_vl_moe"})
    with pytest.raises(NamesError, match=r"2 ways(?s:.*)--transformers-version"):
        fit(tables.entries(shapes), base)
    key = "model.language_model.layers.0.mlp.experts.down_proj"
    for version, strides in (((4, 57), None), ((5, 23), (64, 1, 8))):
        options = FitOptions(transformers_version=version)
        found = fit(tables.entries(shapes), base, options=options)
        assert found.entries[key].fragments[0].strides == strides
