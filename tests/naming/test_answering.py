"""Every name that a loaded model asks for, from names and shapes of the files alone."""

from __future__ import annotations

import pytest

from reshard.naming.answering import answers
from reshard.naming.layouts import parse_version
from tests.naming import tables
from tests.naming.test_memory import FULL

# Models whose experts a loaded model of transformers 5 stacks, or holds turned.
STACKED = {
    name for name in FULL if any(part in name for part in ("moe", "mixtral", "deepseek"))
}  # fmt: skip


@pytest.mark.parametrize("files", ["4.57", "5.23"])
@pytest.mark.parametrize("name", FULL)
def test_each_versions_names_are_there_or_it_is_said_to_be_apart(name: str, files: str) -> None:
    """Files as transformers 4.57 writes them, and as 5.23 does."""
    table = tables.table(files, name)
    shapes = table.disk_shapes()
    found = answers(shapes, table.config)
    every = {more for own in shapes for more in (own, *found.names.get(own, ()))}
    for version in tables.VERSIONS:
        if name in tables.names(version):
            apart = any(apart.holds(parse_version(version)) for apart in found.apart)
            lost = tables.table(version, name).memory.keys() - every
            assert bool(lost) <= apart, (version, sorted(lost)[:3])
    assert bool(found.apart) == (name in STACKED)


@pytest.mark.parametrize("name", sorted(set(FULL) - STACKED))
def test_a_name_is_that_of_the_tensor_with_the_same_values(name: str) -> None:
    """Which tensor of the files a name in memory is, as the tables of real modules say it."""
    table = tables.table("4.57", name)
    found = answers(table.disk_shapes(), table.config)
    owner = {more: own for own, names in found.names.items() for more in names}
    for version in ("4.51", "4.57"):
        if name in tables.names(version):
            loaded = tables.table(version, name)
            for own, here in loaded.disk.items():
                if isinstance(here, str) and own in table.disk and here != own:
                    assert owner[here] == own, (version, here)


def test_a_name_is_never_that_of_two_tensors() -> None:
    """Files in which a loaded model's name is that of another tensor: that version is apart."""
    config = {"model_type": "gpt_neox", "tie_word_embeddings": False}
    shapes = {
        "gpt_neox.embed_in.weight": (8, 4),
        "embed_out.weight": (8, 4),
        "lm_head.weight": (8, 4),
    }
    found = answers(shapes, config)
    assert not found.names
    (apart,) = found.apart
    assert (apart.versions, apart.name) == ("5.0 and later", "lm_head.weight")


@pytest.mark.parametrize(
    ("config", "versions"),
    [
        ({"model_type": "dinov2"}, "5.0 and later"),
        ({"model_type": "marian", "architectures": ["MarianMTModel"]}, "of every version"),
    ],
)
def test_what_is_not_known_is_said(config: dict[str, object], versions: str) -> None:
    (apart,) = answers({"a.weight": (2, 2)}, config).apart
    assert (apart.versions, apart.name) == (versions, "")


@pytest.mark.parametrize("value", [5, "LlamaModel", [3, None], {"a": 1}, None])
def test_a_config_of_other_types_is_no_obstacle(value: object) -> None:
    config = {
        "model_type": value,
        "architectures": value,
        "text_config": value,
        "tie_word_embeddings": value,
        "num_hidden_layers": value,
        "num_nextn_predict_layers": value,
        "decoder": value,
        "vision_config": value,
    }
    shapes = {"model.embed_tokens.weight": (8, 4), "model.layers.3.norm.weight": (4,)}
    assert not answers(shapes, config).apart


def test_half_a_layers_experts() -> None:
    shapes = {f"model.layers.0.mlp.experts.{e}.down_proj.weight": (4, 4) for e in (0, 2)}
    (apart,) = answers(shapes, {"model_type": "qwen3_moe"}).apart
    assert apart.name == "model.layers.0.mlp.experts.down_proj"
