"""Whatever stands in a folder's small files, the doctor names it or lives with it."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import reshard
from tests import budget
from tests.budget import needs_proc
from tests.doctor import models
from tests.doctor.conftest import Pairs

FIELDS = (
    "architectures", "vocab_size", "tie_word_embeddings", "dtype", "torch_dtype", "auto_map",
    "model_type", "hidden_size", "vision_config", "quantization_config",
)  # fmt: skip
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 200),
    st.floats(allow_nan=False),
    st.sampled_from(["float32", "llava", "qwen3_vl_moe", "LlamaForCausalLM", "a.B", "--.", ""]),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
CONFIGS = st.fixed_dictionaries({}, optional=dict.fromkeys(FIELDS, VALUES))


@pytest.fixture(scope="module")
def folder(pairs: Pairs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without a head of its own, so that the config decides whether one is missing."""
    return pairs("llama_tied").copy(tmp_path_factory.mktemp("hostile") / "model")


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(config=CONFIGS, text=CONFIGS | VALUES, both=st.booleans())
def test_any_config(pairs: Pairs, folder: Path, config: object, text: object, both: bool) -> None:
    assert isinstance(config, dict)
    (folder / "config.json").write_text(json.dumps({**config, "text_config": text}))
    diagnosis = reshard.doctor(folder, base=pairs("llama_tied").base if both else None)
    json.dumps(diagnosis.to_json())


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    file=st.sampled_from(
        ["tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json",
         "generation_config.json", "chat_template.json", "processor_config.json"]
    ),
    value=st.fixed_dictionaries(
        {}, optional=dict.fromkeys(("model", "added_tokens", "weight_map", "chat_template"), VALUES)
    ) | VALUES | st.just({"model": {"vocab": {"a": [1], "b": 2}}, "added_tokens": [{}, 3]}),
)  # fmt: skip
def test_any_small_file(pairs: Pairs, folder: Path, file: str, value: object) -> None:
    path = folder / file
    before = path.read_text() if path.exists() else None
    path.write_text(json.dumps(value))
    try:
        json.dumps(reshard.doctor(folder, base=pairs("llama_tied").base).to_json())
    finally:
        if before is None:
            path.unlink()
        else:
            path.write_text(before)


NAMES = (
    "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", "module.model.norm.weight",
    "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj",
    "model.language_model.embed_tokens.weight", "x",
)  # fmt: skip
SHAPES = st.lists(st.sampled_from([0, 1, 2, 32, 96]), max_size=3)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    shapes=st.dictionaries(st.sampled_from(NAMES), SHAPES),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.int8, torch.bool]),
    whole=st.booleans(),
)
def test_any_tensors(
    pairs: Pairs,
    tmp_path_factory: pytest.TempPathFactory,
    shapes: dict[str, list[int]],
    dtype: torch.dtype,
    whole: bool,
) -> None:
    ill = tmp_path_factory.mktemp("tensors")
    config = {"model_type": "gpt_oss", "hidden_size": 32, "tie_word_embeddings": True}
    (ill / "config.json").write_text(json.dumps(config))
    base = pairs("llama_tied").base
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}
    models.save(ill, {**(models.load(base) if whole else {}), **tensors})
    for known in (base, None):
        diagnosis = reshard.doctor(ill, base=known)
        json.dumps(diagnosis.to_json())
        assert diagnosis.findings or known is None


@needs_proc
@pytest.mark.parametrize("form", ["v{0}.weight", "v{0}.weight v{0}.weight_scale_inv"])
def test_very_many_tensors_of_a_fault(form: str, tmp_path: Path) -> None:
    """Each name was looked for among all placeholders, or all stale scales: minutes of 100,000."""
    names = [name for number in range(40_000) for name in form.format(number).split()][:40_000]
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    raw = json.dumps(dict.fromkeys(names, empty)).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw)
    seconds, peak, said = budget.run("doctor", tmp_path)
    assert "zero3-placeholders" in said
    assert seconds < budget.SECONDS
    assert peak < budget.MEMORY
