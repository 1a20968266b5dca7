"""From the real DeepSpeed to a folder that the real transformers loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file

import reshard
from reshard.conversion.options import DTypeChoice
from reshard.transfer import making
from tests.deepspeed.test_reading import same_bits
from tests.oracle.cache import Oracle
from tests.oracle.recipes import RECIPES
from tests.tensors import raw

LLAMAS = ["llama-zero2", "llama-zero3", "llama-tied-zero2", "llama-tied-zero3"]


@pytest.mark.parametrize("name", [recipe.name for recipe in RECIPES])
def test_without_a_base_the_masters_are_written_as_they_are(
    oracle: Oracle, name: str, tmp_path: Path
) -> None:
    saved = oracle[name].last
    report = reshard.convert(saved.path, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    opened = reshard.open(saved.path)
    stored = {n: t for n, t in opened.tensors.items() if t.kind != "tied"}
    assert written.keys() == stored.keys() == set(saved.expected())
    for tensor in stored.values():
        assert same_bits(written[tensor.name], tensor.numpy()), tensor.name
    assert report.verified
    assert report.num_tensors == len(written)


@pytest.mark.parametrize("name", LLAMAS)
def test_the_converted_model_is_the_trained_one(oracle: Oracle, name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    case = oracle[name]
    report = reshard.convert(case.root, tmp_path / "out", base=case.base)
    assert report.changed == report.compared == report.num_tensors
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype="auto"
    )
    assert not any(info.values()), info
    truth = case.last.module()
    state = model.state_dict()
    assert state.keys() == truth.keys()
    for key, value in state.items():
        expected = torch.from_numpy(truth[key].view(np.uint16)).view(torch.bfloat16)
        assert torch.equal(value, expected), key
    base_files = {path.name for path in case.base.iterdir() if path.suffix != ".safetensors"}
    for file in base_files:
        assert (tmp_path / "out" / file).read_bytes() == (case.base / file).read_bytes()


@pytest.mark.parametrize("name", LLAMAS)
@pytest.mark.parametrize("size", ["5GB", "20KB"])
def test_shards_and_index_are_those_of_save_pretrained(
    oracle: Oracle, name: str, size: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    case = oracle[name]
    reshard.convert(case.root, tmp_path / "out", base=case.base, max_shard_size=size)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    model.save_pretrained(tmp_path / "again", max_shard_size=size)
    shards = sorted(path.name for path in (tmp_path / "again").glob("model*"))
    assert shards == sorted(path.name for path in (tmp_path / "out").glob("model*"))
    assert len(shards) == 1 or len(shards) > 3
    for shard in shards:
        mine, theirs = tmp_path / "out" / shard, tmp_path / "again" / shard
        if shard.endswith(".json"):
            assert json.loads(mine.read_text()) == json.loads(theirs.read_text())
        else:
            assert mine.read_bytes() == theirs.read_bytes()


def test_dtypes_follow_the_base_or_the_option(oracle: Oracle, tmp_path: Path) -> None:
    case = oracle["llama-zero3"]
    masters = case.last.masters()
    choices: list[tuple[DTypeChoice, str]] = [
        ("keep", "F32"), ("float32", "F32"), ("float16", "F16"),
    ]  # fmt: skip
    for dtype, code in choices:
        out = tmp_path / dtype
        reshard.convert(case.root, out, base=case.base, dtype=dtype)
        with safe_open(out / "model.safetensors", "pt") as file:
            assert {file.get_slice(name).get_dtype() for name in file.keys()} == {code}  # noqa: SIM118
            for name in masters:
                expected = torch.from_numpy(masters[name])
                if code == "F16":
                    expected = expected.to(torch.float16)
                assert torch.equal(file.get_tensor(name), expected)
    stated = json.loads((tmp_path / "float16" / "config.json").read_text())
    assert stated["dtype"] == "float16"


def test_the_bytes_do_not_depend_on_threads_place_or_block(
    oracle: Oracle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = oracle["llama-zero3"]
    copy = tmp_path / "elsewhere"
    shutil.copytree(case.root, copy)
    reshard.convert(case.root, tmp_path / "one", base=case.base, threads=1)
    reshard.convert(copy, tmp_path / "four", base=case.base, threads=4)
    monkeypatch.setattr(making, "_BLOCK", 512)
    reshard.convert(copy, tmp_path / "small", base=case.base, threads=3)
    for other in ("four", "small"):
        for file in sorted((tmp_path / "one").iterdir()):
            assert file.read_bytes() == (tmp_path / other / file.name).read_bytes(), file


def test_the_input_is_not_touched(oracle: Oracle, tmp_path: Path) -> None:
    case = oracle["llama-zero2"]

    def state() -> dict[str, tuple[int, int]]:
        folders = (case.root, case.base)
        files = [path for folder in folders for path in folder.rglob("*")]
        return {str(f): (f.stat().st_mtime_ns, f.stat().st_size) for f in files}

    before = state()
    reshard.convert(case.root, tmp_path / "out", base=case.base)
    assert state() == before


def test_an_unchanged_result_is_an_error(oracle: Oracle, tmp_path: Path) -> None:
    case = oracle["llama-zero2"]
    reshard.convert(case.root, tmp_path / "trained", base=case.base)
    with pytest.raises(reshard.VerificationError, match="nothing was trained"):
        reshard.convert(case.root, tmp_path / "out", base=tmp_path / "trained")
    assert not (tmp_path / "out").exists()
    report = reshard.convert(
        case.root, tmp_path / "out", base=tmp_path / "trained", allow_unchanged=True
    )
    assert (report.changed, report.compared) == (0, report.num_tensors)
    assert any("equal the base" in warning for warning in report.warnings)


def test_every_other_file_of_the_base_comes_along(oracle: Oracle, tmp_path: Path) -> None:
    case = oracle["llama-zero2"]
    base = tmp_path / "base"
    shutil.copytree(case.base, base)
    extras = {
        "tokenizer.json": "{}",
        "chat_template.jinja": "{{ messages }}",
        "modeling_custom.py": "raise SystemExit",
        "additional_chat_templates/tool.jinja": "x",
        "1_Pooling/config.json": "{}",
    }
    for name, text in extras.items():
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(text)
    torch.save({"w": torch.zeros(2)}, base / "pytorch_model.bin")
    reshard.convert(case.root, tmp_path / "out", base=base)
    for name, text in extras.items():
        assert (tmp_path / "out" / name).read_text() == text
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors.index.fp16.json",
        "pytorch_model.bin.index.json",
        "onnx/model.onnx_data",
        "onnx/model.onnx.data",
        "openvino/openvino_model.xml",
        "flax_model.msgpack",
        "weights.npz",
        "saved_model/saved_model.pb",
        "model_state.pdparams",
        "coreml/model.mlmodel",
        # transformers would look for the adapter's weights, and not load the folder.
        "adapter_config.json",
    ],
)
def test_no_weights_of_the_base_come_along(oracle: Oracle, tmp_path: Path, name: str) -> None:
    case = oracle["llama-zero2"]
    base = tmp_path / "base"
    shutil.copytree(case.base, base)
    (base / name).parent.mkdir(exist_ok=True)
    (base / name).write_text("{}")
    reshard.convert(case.root, tmp_path / "out", base=base)
    assert not (tmp_path / "out" / name).exists()
    assert (tmp_path / "out" / "config.json").exists()


def test_frozen_parameters_can_be_left_out_or_filled(oracle: Oracle, tmp_path: Path) -> None:
    saved = oracle["zero3-bf16-w2"].last
    frozen = set(saved.facts["frozen"]) - set(saved.facts["tied"])
    assert frozen
    reshard.convert(saved.path, tmp_path / "out", exclude_frozen=True)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == set(saved.expected()) - frozen


@pytest.mark.parametrize("stage", [2, 3])
def test_adapters_on_a_model_whose_frozen_embedding_is_its_head(
    oracle: Oracle, tmp_path: Path, stage: int
) -> None:
    """As PEFT under the Hugging Face Trainer: the frozen parameters are excluded."""
    case = oracle[f"lora-tied-zero{stage}"]
    report = reshard.convert(
        case.root, tmp_path / "out", base=case.base, lora_alpha=6, fill_from_base=True
    )
    base = load_file(case.base / "model.safetensors")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == base.keys()
    assert "lm_head.weight" not in written
    embedding = "model.embed_tokens.weight"
    assert same_bits(written[embedding], base[embedding])
    # Its other name is left in the module, where that holds weights.
    assert report.tied == ({"lm_head.weight": embedding} if stage == 2 else {})
    assert (embedding in report.filled) == (stage == 3)
    assert report.merged == 4
    reshard.verify(tmp_path / "out", case.root, base=case.base)


def test_reshard_json_holds_the_digest_of_every_tensor(oracle: Oracle, tmp_path: Path) -> None:
    import xxhash

    case = oracle["llama-tied-zero3"]
    reshard.convert(case.root, tmp_path / "out", base=case.base)
    stated = json.loads((tmp_path / "out" / "reshard.json").read_text())
    assert stated["source"] == {
        "format": "deepspeed",
        "framework": "deepspeed",
        "version": case.last.facts["deepspeed"],
        "tag": "global_step2",
        "world_size": 2,
    }
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert stated["tensors"].keys() == set(file.keys())
        for name, tensor in stated["tensors"].items():
            value = file.get_tensor(name)
            assert tensor["dtype"] == "bfloat16"
            assert tuple(tensor["shape"]) == tuple(value.shape)
            assert tensor["xxh3_128"] == xxhash.xxh3_128(raw(value)).hexdigest()
    assert str(tmp_path) not in json.dumps(stated)
