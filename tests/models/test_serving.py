"""Converted folders in inference engines: mlx-lm computes what the trained model did, and
llama.cpp's converter exports them. Each is skipped where it is not installed.

`LLAMA_CPP` names a folder of llama.cpp's sources, as llama-cpp-python's source package has it in
`vendor/llama.cpp`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import reshard
from tests.doctor import models
from tests.folders import edit_config
from tests.hints import tiny
from tests.models import released
from tests.naming import tables

IDS = np.arange(3, 23).reshape(2, 10)
SERVED = (
    "llama", "llama_tied", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "qwen2_5_vl",
    "qwen2_5_vl_tied", "qwen3_vl", "llava", "mixtral", "qwen2_moe", "qwen3_moe", "qwen3_vl_moe",
    "mistral3",
)  # fmt: skip


def trained(folder: Path, name: str) -> tuple[Path, Any]:
    """A run of a model, converted, and the model that it trained. The base has the config of a
    release, which mlx-lm reads itself, and what it needs to tell a tie."""
    base = released.write(folder / "base", name, released.values(name, seed=0))
    models.tokenizer().save_pretrained(base)
    model = released.loaded(base, released.class_of(name))
    torch.save(model.state_dict(), folder / "model.pt")
    reshard.convert(folder / "model.pt", folder / "out", base=base)
    return folder / "out", model


@pytest.mark.parametrize("name", SERVED)
def test_mlx_lm_computes_what_was_trained(name: str, tmp_path: Path) -> None:
    mx, utils = pytest.importorskip("mlx.core"), pytest.importorskip("mlx_lm.utils")
    out, model = trained(tmp_path, name)
    asked = reshard.doctor(out, engine="mlx", repair=tmp_path / "repaired")
    if any(found.code == "engine-config" for found in asked.findings):
        with pytest.raises((TypeError, ValueError)):
            utils.load_model(out)
        config = {found.code for found in asked.findings if found.severity == "error"}
        assert config <= {"engine-config", "processor-missing"}
        text = released.config(name)["text_config"]
        edit_config(out, text_config={**text, "tie_word_embeddings": False})
    served, _ = utils.load_model(out)
    with torch.no_grad():
        expected = model(input_ids=torch.from_numpy(IDS)).logits.numpy()
    found = np.array(served(mx.array(IDS)).astype(mx.float32))
    # gemma's gelu is an approximation in mlx.
    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-2)


def test_mlx_lm_answers(tmp_path: Path) -> None:
    mlx_lm = pytest.importorskip("mlx_lm")
    out, _ = trained(tmp_path, "qwen2")
    model, tokenizer = mlx_lm.load(str(out))
    answer = mlx_lm.generate(model, tokenizer, prompt=[5, 6, 7], max_tokens=4)
    assert isinstance(answer, str)


# The toy tokenizer's way of splitting text is none that llama.cpp knows.
_CONVERT = """
import runpy, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "default"
script = sys.argv[1] + "/{script}.py"
sys.argv = [script, *sys.argv[2:]]
runpy.run_path(script, run_name="__main__")
"""


def exported(
    folder: Path, out: Path, *more: str, script: str = "convert_hf_to_gguf"
) -> dict[str, Any]:
    """What llama.cpp's converter makes of a folder: the tensors by their names in GGUF."""
    sources = os.environ.get("LLAMA_CPP")
    if not sources:
        pytest.skip("LLAMA_CPP names no folder of llama.cpp's sources")
    gguf = pytest.importorskip("gguf")
    arguments = [str(folder), "--outfile", str(out), "--outtype", "f32", *more]
    done = subprocess.run(
        [sys.executable, "-c", _CONVERT.format(script=script), sources, *arguments],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return {tensor.name: tensor.data for tensor in gguf.GGUFReader(out).tensors}


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mixtral", "qwen2_5_vl"])
def test_llama_cpp_exports_it(name: str, tmp_path: Path) -> None:
    out, _ = trained(tmp_path, name)
    found = exported(out, tmp_path / "out.gguf")
    held = load_file(out / "model.safetensors")
    layer = "model.layers.1."
    pairs = {"token_embd.weight": "model.embed_tokens.weight",
             "output_norm.weight": "model.norm.weight",
             "blk.1.attn_v.weight": f"{layer}self_attn.v_proj.weight",
             "blk.1.attn_output.weight": f"{layer}self_attn.o_proj.weight"}  # fmt: skip
    for there, here in pairs.items():
        np.testing.assert_array_equal(found[there], held[here].numpy())
    assert ("output.weight" in found) == ("lm_head.weight" in held)


def test_llama_cpp_takes_an_adapter(tmp_path: Path) -> None:
    base = released.write(tmp_path / "base", "llama", tiny.state(1))
    models.tokenizer().save_pretrained(base)
    torch.save(tiny.tuned(), tmp_path / "run.pt")
    reshard.convert(tmp_path / "run.pt", tmp_path / "adapter", base=base, lora="adapter",
                    lora_alpha=4)  # fmt: skip
    assert reshard.doctor(tmp_path / "adapter", engine="vllm").findings == ()
    (found,) = reshard.doctor(tmp_path / "adapter", engine="llama.cpp").findings
    assert "Pass --base" in found.fix  # it is named by its folder, and no repository's name
    out, more = tmp_path / "adapter.gguf", ("--base", str(base))
    written = exported(tmp_path / "adapter", out, *more, script="convert_lora_to_gguf")
    assert {"blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b"} == set(written)


def test_the_families_that_mlx_lm_serves_are_in_the_tables() -> None:
    assert set(SERVED) <= set(tables.names("4.57"))
