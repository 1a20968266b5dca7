"""Files -> the tensors of a loaded model: every key of its state dict, shape for shape."""

from __future__ import annotations

import numpy as np
import pytest
import transformers

from reshard.errors import PlanError, UnsupportedError
from reshard.naming import NEWEST, parse_version, to_memory, was_read
from tests.naming import tables
from tests.naming.tables import fit
from tests.naming.test_layout_tables import equal

# Backbone classes have layouts of their own; loaded full models are what a trainer loads into.
FULL = [name for name in tables.names("4.57") if not name.endswith("_backbone")]


@pytest.mark.parametrize("written", ["4.57", "5.23"], ids=["released", "transformers 5"])
@pytest.mark.parametrize("version", tables.VERSIONS)
@pytest.mark.parametrize("name", FULL)
def test_files_become_the_live_state_dict(version: str, name: str, written: str) -> None:
    if name not in tables.names(version):
        pytest.skip(f"transformers {version} has no such model")
    files, loaded = tables.table(written, name), tables.table(version, name)
    found = to_memory(tables.entries(files.disk_shapes()), files.config, parse_version(version))
    assert {key: entry.spec.shape for key, entry in found.items()} == loaded.memory


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


@pytest.mark.parametrize(
    ("class_name", "constants"),
    [
        ("LlamaForCausalLM", ["model.layers.0.self_attn.rotary_emb.inv_freq"]),
        ("GPT2LMHeadModel", ["transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"]),
        ("GPTNeoXForCausalLM", ["gpt_neox.layers.0.attention.bias",
                                "gpt_neox.layers.0.attention.masked_bias"]),
        ("BertForMaskedLM", ["bert.embeddings.position_ids"]),
    ],
)  # fmt: skip
def test_constants_that_a_loaded_model_computes_are_not_in_its_state(
    class_name: str, constants: list[str]
) -> None:
    class_ = getattr(transformers, class_name)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 40,
        "n_embd": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "n_layer": 1,
        "n_head": 2,
    }
    model = class_(class_.config_class(**sizes))
    state = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    config = {**model.config.to_dict(), "architectures": [class_name]}
    files = {**state, **dict.fromkeys(constants, (1, 4))}
    assert not set(constants) & state.keys()
    assert to_memory(tables.entries(files), config).keys() == state.keys()


def test_which_versions_were_read() -> None:
    known = ["4.49", "4.57.1", "5.0", "5.23.9"]
    assert all(was_read(parse_version(version)) for version in known)
    assert not any(was_read(parse_version(version)) for version in ("4.48.3", "5.24", "6.0"))


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
        with pytest.raises(PlanError, match="is not a version"):
            parse_version(text)
