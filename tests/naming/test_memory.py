"""Files -> the tensors of a live module: every key of its state dict, shape for shape."""

from __future__ import annotations

import numpy as np
import pytest

from reshard.errors import PlanError, UnsupportedError
from reshard.naming import NEWEST, parse_version, to_memory
from tests.naming import tables
from tests.naming.tables import fit
from tests.naming.test_layout_tables import equal

# Backbone classes have layouts of their own; live full models are what a trainer loads into.
FULL = [name for name in tables.names("4.57") if not name.endswith("_backbone")]


@pytest.mark.parametrize("version", tables.VERSIONS)
@pytest.mark.parametrize("name", FULL)
def test_released_files_become_the_live_state_dict(version: str, name: str) -> None:
    if name not in tables.names(version):
        pytest.skip(f"transformers {version} has no such model")
    hub, live = tables.table("4.57", name), tables.table(version, name)
    found = to_memory(tables.entries(hub.disk_shapes()), hub.config, parse_version(version))
    assert {key: entry.spec.shape for key, entry in found.items()} == live.memory


@pytest.mark.parametrize("name", FULL)
def test_there_and_back_gives_the_same_values(name: str) -> None:
    hub = tables.table("4.57", name)
    arrays = tables.random_arrays(hub.disk_shapes())
    content = tables.files(arrays)
    memory = to_memory(tables.entries(hub.disk_shapes()), hub.config)
    back = fit(memory, hub.schema(), equal=equal)
    assert back.entries.keys() == arrays.keys()
    for key, array in arrays.items():
        np.testing.assert_array_equal(tables.values(back.entries[key], content), array)


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("version", tables.VERSIONS)
def test_what_transformers_5_writes_becomes_the_live_state_dict(version: str, name: str) -> None:
    if name not in tables.names(version):
        pytest.skip(f"transformers {version} has no such model")
    late, live = tables.table("5.23", name), tables.table(version, name)
    found = to_memory(tables.entries(late.disk_shapes()), late.config, parse_version(version))
    assert {key: entry.spec.shape for key, entry in found.items()} == live.memory


def test_a_version_without_the_model() -> None:
    hub = tables.table("4.57", "qwen3_vl_moe")
    with pytest.raises(UnsupportedError, match=r"transformers 4\.51 has no model .*qwen3_vl_moe"):
        to_memory(tables.entries(hub.disk_shapes()), hub.config, (4, 51))


def test_an_expert_that_is_missing() -> None:
    hub = tables.table("4.57", "mixtral")
    shapes = hub.disk_shapes()
    del shapes["model.layers.1.block_sparse_moe.experts.1.w3.weight"]
    with pytest.raises(PlanError, match="without gaps"):
        to_memory(tables.entries(shapes), hub.config, NEWEST)


def test_a_version_is_numbers() -> None:
    assert parse_version("5.0.0.dev0") == (5, 0, 0)
    for text in ("latest", "9" * 5000, ""):
        with pytest.raises(PlanError, match="no version"):
            parse_version(text)
