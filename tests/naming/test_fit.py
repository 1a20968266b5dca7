"""The fit's exceptions and refusals: ties, vocabularies, constants, what is missing or extra."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reshard.core.dtypes import FLOAT32
from reshard.core.tensors import Entry, Extent, FileRef, Fragment, Shape, TensorSpec, flat
from reshard.errors import NamesError
from reshard.naming import FitOptions, Resize
from reshard.naming.families import WRAPPERS
from tests.naming import tables
from tests.naming.tables import Fitted, fit

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


NORM = "model.norm.weight"


TIED: dict[str, Shape] = {EMBEDDING: (6, 2), NORM: (2,)}


UNTIED: dict[str, Shape] = {**TIED, HEAD: (6, 2)}


def run(
    source: Mapping[str, Entry | Shape],
    base: Mapping[str, Shape],
    config: dict[str, Any] | None = None,
    same: bool = True,
    **options: Any,
) -> Fitted:
    """The fit of a source on a base; two tensors that are compared have the same values or not."""
    entries = {
        name: item if isinstance(item, Entry) else tables.entry(name, item)
        for name, item in source.items()
    }
    return fit(
        entries,
        tables.schema(base, config),
        options=FitOptions(**options),
        equal=lambda one, other: same,
    )


# --- heads -------------------------------------------------------------------------------------


def test_a_head_equal_to_the_embedding_is_left_out_as_the_base_does() -> None:
    found = run(UNTIED, TIED, {"tie_word_embeddings": True})
    assert found.entries.keys() == TIED.keys()
    assert found.matching.tied == {HEAD: EMBEDDING}
    assert found.config_patches == {}


def test_a_head_that_differs_is_written_and_the_config_says_so() -> None:
    config = {"tie_word_embeddings": True, "text_config": {"model_type": "llama"}}
    found = run(UNTIED, TIED, config, same=False)
    assert tables.origin(found.entries[HEAD]) == HEAD
    assert tables.origin(found.entries[EMBEDDING]) == EMBEDDING
    assert found.matching.tied == {}
    assert found.config_patches == {
        "tie_word_embeddings": False,
        "text_config.tie_word_embeddings": False,
    }
    assert HEAD in found.findings[0].message


def test_a_head_that_the_base_stores_is_stored() -> None:
    found = run(UNTIED, UNTIED, {"tie_word_embeddings": False})
    assert tables.origin(found.entries[HEAD]) == HEAD
    assert found.matching.tied == {}


def test_a_config_that_contradicts_the_weights_is_corrected() -> None:
    """InternVL's default config says tied; a converter that builds the model writes the head
    into the embedding."""
    shapes = tables.table("4.57", "internvl").disk_shapes()
    config = {**tables.table("4.57", "internvl").config, "tie_word_embeddings": True}
    memory = tables.table("5.23", "internvl").memory
    found = run(dict(memory), shapes, config, same=False)
    assert tables.origin(found.entries["language_model.lm_head.weight"]) == "lm_head.weight"
    embedding = found.entries["language_model.model.embed_tokens.weight"]
    assert tables.origin(embedding) == "model.language_model.embed_tokens.weight"
    assert found.config_patches["tie_word_embeddings"] is False
    assert found.config_patches["text_config.tie_word_embeddings"] is False


@pytest.mark.parametrize("stored", [EMBEDDING, HEAD])
def test_one_tensor_with_two_names_is_stored_as_the_base_stores_it(stored: str) -> None:
    (other,) = {EMBEDDING, HEAD} - {stored}
    source = {
        stored: tables.entry(stored, (6, 2), aliases=(other,)),
        NORM: tables.entry(NORM, (2,)),
    }
    once = run(source, TIED, same=False)
    assert tables.origin(once.entries[EMBEDDING]) == stored
    assert once.matching.tied == {HEAD: EMBEDDING}
    assert once.entries[EMBEDDING].aliases == ()
    twice = run(source, UNTIED, same=False)
    assert tables.origin(twice.entries[HEAD]) == tables.origin(twice.entries[EMBEDDING]) == stored


def test_a_stored_head_comes_from_the_embedding_where_the_config_ties_them() -> None:
    found = run(TIED, UNTIED, {"tie_word_embeddings": True})
    assert tables.origin(found.entries[HEAD]) == EMBEDDING
    with pytest.raises(NamesError) as caught:
        run(TIED, UNTIED, {"tie_word_embeddings": False})
    assert caught.value.missing == (HEAD,)


@pytest.mark.parametrize("stored", [TIED, UNTIED])
def test_a_tied_embedding_that_is_saved_under_its_heads_name(stored: dict[str, Shape]) -> None:
    source = {HEAD: (6, 2), NORM: (2,)}
    found = run(source, stored, {"tie_word_embeddings": True})
    assert found.entries.keys() == stored.keys()
    assert tables.origin(found.entries[EMBEDDING]) == HEAD
    assert found.config_patches == {}
    assert "is read from 'lm_head.weight'" in found.findings[0].message
    with pytest.raises(NamesError, match=r"1 of the base are not.*\n  model\.embed_tokens"):
        run(source, stored, {"tie_word_embeddings": False})


@pytest.mark.parametrize("stored", [TIED, UNTIED])
def test_a_head_that_was_trained_apart_is_no_embedding(stored: dict[str, Shape]) -> None:
    source = {HEAD: (6, 2), NORM: (2,)}
    config = {"tie_word_embeddings": True}
    found = run(source, stored, config, fill_from_base=True, untied=frozenset([HEAD]))
    assert found.entries.keys() == {HEAD, NORM}
    assert found.matching.filled == (EMBEDDING,)
    assert found.config_patches == {"tie_word_embeddings": False}


@pytest.mark.parametrize("stored", [TIED, UNTIED])
def test_a_head_stays_behind_an_embedding_that_was_trained_apart(stored: dict[str, Shape]) -> None:
    config, apart = {"tie_word_embeddings": True}, frozenset([EMBEDDING])
    found = run(TIED, stored, config, fill_from_base=True, untied=apart)
    assert found.entries.keys() == TIED.keys()
    assert found.config_patches == {"tie_word_embeddings": False}
    if stored == TIED:
        assert found.from_base == {HEAD: EMBEDDING}
    else:
        assert found.matching.filled == (HEAD,)
    with pytest.raises(NamesError, match="--fill-from-base") as caught:
        run(TIED, stored, config, untied=apart)
    assert caught.value.missing == (HEAD,)
    with pytest.raises(NamesError, match=r"does not hold the head, of shape \(9, 2\)"):
        run({**TIED, EMBEDDING: (9, 2)}, stored, config, fill_from_base=True, untied=apart)
    both = run(UNTIED, stored, config, untied=apart)
    assert both.config_patches == {}
    assert both.from_base == {}


def test_a_tie_that_nobody_compared_is_listed() -> None:
    found = fit(tables.entries(UNTIED), tables.schema(TIED))
    assert found.undecided == ((HEAD, EMBEDDING),)
    assert found.entries.keys() == TIED.keys()


def test_a_class_without_a_head() -> None:
    found = run(TIED, UNTIED, {"tie_word_embeddings": False}, headless=True)
    assert found.matching.missing == (HEAD,)
    assert found.entries.keys() == TIED.keys()


@pytest.mark.parametrize("allow", ["lm_head*", "*"])
def test_what_may_be_left_out_is_not_where_it_fits(allow: str) -> None:
    """A layout that reads a tensor as one of another place would leave it and the base's out."""
    base = tables.table("4.57", "llama").disk_shapes()
    found = run(base, base, tables.table("4.57", "llama").config, allow=(allow,))
    assert found.entries.keys() == base.keys()


# --- vocabularies ------------------------------------------------------------------------------


def test_a_resized_vocabulary_is_written_into_the_config() -> None:
    source = {**UNTIED, EMBEDDING: (9, 2), HEAD: (9, 2)}
    found = run(source, UNTIED, {"vocab_size": 6, "text_config": {"vocab_size": 6}})
    assert {(item.name, item.base_rows, item.rows) for item in found.matching.resized} == {
        (EMBEDDING, 6, 9),
        (HEAD, 6, 9),
    }
    assert found.entries[HEAD].spec.shape == (9, 2)
    assert found.config_patches == {"vocab_size": 9, "text_config.vocab_size": 9}
    inner = run(source, UNTIED, {"text_config": {"vocab_size": 6}})
    assert inner.config_patches == {"text_config.vocab_size": 9}


def test_a_resized_embedding_resizes_the_head_that_is_copied_from_it() -> None:
    found = run({**TIED, EMBEDDING: (9, 2)}, UNTIED, {"tie_word_embeddings": True})
    assert Resize(HEAD, 6, 9) in found.matching.resized
    assert found.entries[HEAD].spec.shape == (9, 2)


def test_head_and_embedding_of_two_sizes_are_no_resized_vocabulary() -> None:
    with pytest.raises(NamesError, match=r"\(9, 2\) in the checkpoint, \(6, 2\) in the base"):
        run({**UNTIED, EMBEDDING: (9, 2)}, UNTIED)


# --- prefixes and wrappers ---------------------------------------------------------------------


def test_a_named_part_of_a_larger_checkpoint() -> None:
    source = {
        f"{part}.{name}": shape for part in ("actor", "critic") for name, shape in TIED.items()
    }
    with pytest.raises(NamesError):
        run(source, TIED)
    found = run(source, TIED, prefix="actor.")
    assert found.prefix == "actor."
    assert tables.origin(found.entries[NORM]) == f"actor.{NORM}"
    assert run(source, TIED, prefix="actor").name_map == found.name_map
    with pytest.raises(NamesError, match="none of the checkpoint's 4 tensors has the prefix"):
        run(source, TIED, prefix="ref.")


def test_nothing_to_fit() -> None:
    with pytest.raises(NamesError, match="holds no tensor"):
        run({}, TIED)


def test_two_tensors_that_wrappers_alone_tell_apart() -> None:
    with pytest.raises(NamesError, match=r"'module.model.norm.weight' and 'model.norm.weight'"):
        run({f"module.{NORM}": (2,), NORM: (2,)}, TIED)


@pytest.mark.heavy
@settings(deadline=None)
@given(
    st.lists(st.sampled_from(sorted(WRAPPERS)), max_size=3),
    st.sampled_from(["", "model.", "actor.", "model.base_model.model.", "some.where.deep."]),
    st.integers(0, 3),
)
def test_wrappers_and_prefixes_do_not_matter(wrappers: list[str], prefix: str, at: int) -> None:
    def dress(name: str) -> str:
        parts = (prefix + name).split(".")
        place = min(at, len(parts) - 1)
        return ".".join(parts[:place] + wrappers + parts[place:])

    base = tables.table("4.57", "qwen3").disk_shapes()
    found = run({dress(name): shape for name, shape in base.items()}, base)
    assert {name: tables.origin(entry) for name, entry in found.entries.items()} == {
        name: dress(name) for name in base
    }


# --- experts -----------------------------------------------------------------------------------


def test_transposed_experts_are_turned_to_the_orientation_of_the_base() -> None:
    """transformers 5 saves Qwen3-VL-MoE with the names of the release and turned experts."""
    released = tables.table("4.57", "qwen3_vl_moe").schema()
    late = tables.table("5.23", "qwen3_vl_moe").memory
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    assert late[name] == released.specs[name].shape[:1] + released.specs[name].shape[:0:-1]
    content = tables.files(tables.random_arrays({name: late[name]}))
    found = run(dict(late), {n: s.shape for n, s in released.specs.items()}, dict(released.config))
    array = np.frombuffer(content[name], np.float32).reshape(late[name])
    np.testing.assert_array_equal(tables.values(found.entries[name], content), array.swapaxes(1, 2))
    assert any("exchanged" in rule for rule in found.rules)


def test_stacks_go_through_whole_where_the_base_stacks_too() -> None:
    stacked = tables.table("5.23", "qwen3_moe")
    found = run(dict(stacked.memory), dict(stacked.memory), stacked.config)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert tables.origin(found.entries[name]) == name


@settings(deadline=None)
@given(st.lists(st.integers(0, 3 * 4 * 5), max_size=5), st.booleans())
def test_experts_out_of_flat_parts(cuts: list[int], fused_base: bool) -> None:
    """ZeRO keeps ranges of the flattened stack: they end inside experts, rows and columns."""
    name = "model.layers.0.mlp.experts.gate_up_proj"
    array = tables.random_arrays({name: (3, 4, 5)})[name]
    bounds = sorted({0, array.size, *cuts})
    fragments = []
    content = {}
    for start, stop in itertools.pairwise(bounds):
        content[f"rank{start}"] = array.reshape(-1)[start:stop].tobytes()
        extent = Extent(FileRef(f"rank{start}"), 0, 4 * (stop - start))
        fragments.append(Fragment(flat(array.size, start, stop - start), extent, FLOAT32))
    source = Entry(TensorSpec(name, FLOAT32, array.shape), tuple(fragments))
    shapes: dict[str, Shape] = {name: (3, 4, 5)}
    if not fused_base:
        block = "model.layers.0.mlp.experts"
        parts = [f"{block}.{e}.{p}_proj.weight" for e in range(3) for p in ("gate", "up")]
        shapes = dict.fromkeys(parts, (2, 5))
    found = run({name: source}, shapes, {"model_type": "qwen3_moe"})
    arrays = [tables.values(found.entries[key], content) for key in shapes]
    np.testing.assert_array_equal(np.concatenate(arrays).reshape(3, 4, 5), array)


# --- hostile names and shapes -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["\0", "a\0b", "model.layers.3.\0.weight"])
def test_a_name_that_holds_a_zero_byte_is_one_that_does_not_fit(name: str) -> None:
    with pytest.raises(NamesError) as caught:
        run(TIED | {name: (2,)}, TIED)
    assert caught.value.unexpected == (name,)


def test_endless_experts_of_no_elements_are_not_counted() -> None:
    stacked = "model.layers.0.mlp.experts.gate_up_proj"
    with pytest.raises(NamesError):
        run(TIED | {stacked: (1 << 50, 2, 0)}, TIED | {"model.layers.0.mlp.gate.weight": (2,)})
