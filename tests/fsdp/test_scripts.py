"""The commands that users type: fsdp2hf and hf2fsdp, on models that transformers then loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.distributed import checkpoint as dcp

from tests.budget import MIB, needs_proc, peak
from tests.fsdp.conftest import Oracle
from tests.fsdp.oracle import models

_SCRIPTS = Path(__file__).parents[2] / "lightrft" / "utils" / "ckpt_scripts"


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a script the way its users do, from another folder."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(_SCRIPTS / f"{script}.py"), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose names and shapes are those of the oracle's decoder."""
    config = transformers.Qwen2Config(
        vocab_size=models.VOCAB,
        hidden_size=models.HIDDEN,
        intermediate_size=models.FFN,
        num_hidden_layers=models.LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    folder = tmp_path_factory.mktemp("base")
    transformers.Qwen2ForCausalLM(config).bfloat16().save_pretrained(folder)
    (folder / "tokenizer.json").write_text('{"a": 1}\n', encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", ["lightrft", "accelerate", "titan", "hf-sharded"])
def test_fsdp2hf_of_a_language_model(
    oracle: Oracle, qwen2: Path, tmp_path: Path, name: str
) -> None:
    made = oracle[name]
    done = run(
        "fsdp2hf", "--hf_base", qwen2, "--checkpoint_dir", made.checkpoint,
        "--output_dir", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert isinstance(loaded, transformers.Qwen2ForCausalLM)
    truth = load_file(made.truth)
    state = loaded.state_dict()
    assert state.keys() == truth.keys()
    for key, value in truth.items():
        # The checkpoint may be float32; the base is bfloat16, and so is the output.
        assert torch.equal(state[key], value.bfloat16()), key
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == b'{"a": 1}\n'


def _vision_language() -> Any:
    text = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
    }
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "out_hidden_size": 16,
        "fullatt_block_indexes": [1],
    }
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=False
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def test_fsdp2hf_of_a_vision_language_model(tmp_path: Path) -> None:
    torch.manual_seed(5)
    base = _vision_language()
    base.save_pretrained(tmp_path / "base")
    trained = _vision_language()
    dcp.save(trained.state_dict(), checkpoint_id=tmp_path / "dcp", no_dist=True)
    done = run(
        "fsdp2hf", "--hf_base", tmp_path / "base", "--checkpoint_dir", tmp_path / "dcp",
        "--output_dir", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    loaded, info = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(loaded) is type(trained)
    for key, value in trained.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    names = load_file(tmp_path / "base" / "model.safetensors").keys()
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == names


def test_tied_weights_are_stored_as_the_base_stores_them(
    oracle: Oracle, qwen2: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    config = transformers.Qwen2Config.from_pretrained(qwen2)
    config.tie_word_embeddings = True
    transformers.Qwen2ForCausalLM(config).save_pretrained(base)
    done = run(
        "fsdp2hf", "--hf_base", base, "--checkpoint_dir", oracle["tied"].checkpoint,
        "--output_dir", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert "lm_head.weight" not in written
    assert written.keys() == load_file(base / "model.safetensors").keys()
    embedding = load_file(oracle["tied"].truth)["model.embed_tokens.weight"]
    assert torch.equal(written["model.embed_tokens.weight"], embedding)


def test_a_full_state_dict_of_accelerate(oracle: Oracle, qwen2: Path, tmp_path: Path) -> None:
    """FULL_STATE_DICT: one torch.save file in place of a DCP folder."""
    truth = load_file(oracle["accelerate"].truth)
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    torch.save(truth, folder / "pytorch_model_fsdp.bin")
    done = run(
        "fsdp2hf", "--hf_base", qwen2, "--checkpoint_dir", folder, "--output_dir", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == truth.keys()
    assert all(torch.equal(written[name], truth[name].bfloat16()) for name in truth)


def test_frozen_weights_that_were_not_saved_are_the_bases(qwen2: Path, tmp_path: Path) -> None:
    """accelerate saves the adapters alone of a PEFT model (`adapter_only`, utils/fsdp_utils.py)."""
    base = load_file(qwen2 / "model.safetensors")
    module = "model.layers.0.self_attn.q_proj"
    rows, columns = base[f"{module}.weight"].shape
    adapter = {
        f"base_model.model.{module}.lora_A.default.weight": torch.randn(2, columns),
        f"base_model.model.{module}.lora_B.default.weight": torch.randn(rows, 2),
    }
    folder = tmp_path / "checkpoint-2" / "pytorch_model_fsdp_0"
    dcp.save({"model": adapter}, checkpoint_id=folder, no_dist=True)
    flags = ["--hf_base", qwen2, "--checkpoint_dir", folder.parent, "--lora-alpha", 4]
    done = run("fsdp2hf", *flags, "--output_dir", tmp_path / "out")
    assert done.returncode == 1
    assert "take them from the base: --fill-from-base." in done.stderr
    done = run("fsdp2hf", *flags, "--output_dir", tmp_path / "out", "--fill-from-base")
    assert done.returncode == 0, done.stderr
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == base.keys()
    changed = [name for name in base if not torch.equal(written[name], base[name])]
    assert changed == [f"{module}.weight"]


def test_hf2fsdp_and_back(qwen2: Path, tmp_path: Path) -> None:
    done = run("hf2fsdp", "--hf_checkpoint", qwen2, "--output", tmp_path / "dcp")
    assert done.returncode == 0, done.stderr
    expected = load_file(qwen2 / "model.safetensors")
    state = {name: torch.empty_like(value) for name, value in expected.items()}
    dcp.load(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    for name, value in expected.items():
        assert torch.equal(state[name], value), name
    done = run(
        "fsdp2hf", "--hf_base", qwen2, "--checkpoint_dir", tmp_path / "dcp",
        "--output_dir", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        qwen2 / "model.safetensors"
    ).read_bytes()


def test_hf2fsdp_needs_no_torch(qwen2: Path, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "sys.modules.update(torch=None, safetensors=None, transformers=None)\n"
        "from reshard.cli.lightrft.hf2fsdp import main\n"
        "main()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    arguments = ["--hf_checkpoint", str(qwen2), "--output", str(tmp_path / "dcp")]
    subprocess.run([sys.executable, "-c", code, *arguments], env=environment, check=True)
    assert (tmp_path / "dcp" / ".metadata").is_file()


@pytest.mark.parametrize(
    ("script", "flag", "case", "words"),
    [
        ("hf2fsdp", "--hf_checkpoint", "verl", "Convert it with fsdp2hf."),
        ("fsdp2hf", "--checkpoint_dir", "hf-full", "Convert it with hf2fsdp."),
        ("hf2fsdp", "--hf_checkpoint", "fsdp2-w2", "Convert it with fsdp2hf."),
    ],
)
def test_the_wrong_command_names_the_right_one(
    oracle: Oracle, qwen2: Path, tmp_path: Path, script: str, flag: str, case: str, words: str
) -> None:
    out = (
        ["--output_dir", tmp_path / "out", "--hf_base", qwen2]
        if script == "fsdp2hf"
        else ["--output", tmp_path / "out"]
    )
    done = run(script, flag, oracle[case].checkpoint, *out)
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_hf2fsdp_with_nothing_to_convert(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    config = json.dumps({"model_type": "qwen2"})
    (tmp_path / "hf" / "config.json").write_text(config, encoding="utf-8")
    done = run("hf2fsdp", "--hf_checkpoint", tmp_path / "hf", "--output", tmp_path / "out")
    assert done.returncode == 1
    assert "no checkpoint was recognised here" in done.stderr
    assert not (tmp_path / "out").exists()


@needs_proc
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Both ways through 200 MB, one tensor of them 160 MB, in less than that tensor takes."""
    hf = tmp_path / "hf"
    hf.mkdir()
    header = json.dumps(
        {
            "big": {"dtype": "BF16", "shape": [800, 100_000], "data_offsets": [0, 160_000_000]},
            "flat": {"dtype": "F32", "shape": [10**7], "data_offsets": [160_000_000, 200_000_000]},
        }
    ).encode()
    with open(hf / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 200_000_000)  # zeros that take no space
    code = (
        "import reshard\nreshard.convert(sys.argv[1], sys.argv[2], to=sys.argv[3], verify=False)\n"
    )
    for source, target, to in ((hf, "dcp", "dcp"), (tmp_path / "dcp", "back", "hf")):
        assert peak(code, source, tmp_path / target, to) < 120 * MIB, to
