"""`doctor --for`: right folders are taken, and each damage that an engine lets pass is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig

import reshard
from reshard.cli.app import reshard as command
from reshard.cli.app import run
from reshard.diagnosis.engines import ENGINES, EngineName
from tests.doctor import models
from tests.doctor.conftest import Pairs, repaired
from tests.folders import edit_config
from tests.models import released
from tests.naming import tables

ALL: tuple[EngineName, ...] = tuple(ENGINES)
#: Right folders that an engine refuses all the same: it has no class, or wants other weights.
REFUSED: dict[tuple[str, str], str] = {
    **{(name, engine): "engine-class"
       for name in ("llava_next", "llava_next_mixtral", "internvl", "internvl_moe")
       for engine in ("sglang", "llama.cpp", "mlx")},
    **{("phimoe", engine): "engine-class" for engine in ("vllm", "sglang", "llama.cpp")},
    ("qwen2_audio", "mlx"): "engine-class",
    ("gpt_oss", "mlx"): "engine-weights",
    ("phimoe", "mlx"): "engine-weights",
    ("ernie4_5_moe", "mlx"): "engine-unknown-tensors",  # it drops the correction of the routing
    # 4.57 writes no `tie_word_embeddings` into these text_configs.
    ("qwen2_vl", "mlx"): "engine-config",
    ("qwen2_5_vl", "mlx"): "engine-config",
    ("qwen3_vl_moe", "mlx"): "engine-config",
}  # fmt: skip


def codes(folder: Path, engine: EngineName, **options: Any) -> set[str]:
    """What is found of an engine alone."""
    found = reshard.doctor(folder, engine=engine, **options).findings
    return {each.code for each in found if each.code.startswith("engine-")}


def said(folder: Path, engine: EngineName, code: str) -> str:
    found = reshard.doctor(folder, engine=engine).findings
    return next(each.message for each in found if each.code == code)


@pytest.mark.parametrize("name", released.MODELS)
def test_right_folders(name: str, tmp_path: Path) -> None:
    models.write(tmp_path / "model", name, 1)
    for engine in ALL:
        expected = {REFUSED[name, engine]} if (name, engine) in REFUSED else set()
        assert codes(tmp_path / "model", engine) == expected, engine


def test_weights_that_mlx_reads_as_codes_alone(tmp_path: Path) -> None:
    models.write(tmp_path / "model", "gpt_oss", 1)
    assert codes(tmp_path / "model", "mlx") == {"engine-weights"}


def test_codes_that_mlx_does_not_read(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    models.write(folder, "llama", 1)
    held = models.load(folder)
    for name in [name for name in held if name.endswith("_proj.weight")]:
        held[f"{name}_scale_inv"] = torch.ones(1, 1)
        held[name] = held[name].to(torch.float8_e4m3fn)
    models.save(folder, held)
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}
    edit_config(folder, quantization_config=fp8)
    assert codes(folder, "mlx") == {"engine-weights"}
    assert codes(folder, "vllm") == codes(folder, "llama.cpp") == set()
    reshard.convert(folder, tmp_path / "out")
    assert codes(tmp_path / "out", "mlx") == set()


def damaged(pair: models.Pair, folder: Path, change: Callable[[models.Tensors], object]) -> Path:
    ill = pair.copy(folder)
    tensors = models.load(ill)
    change(tensors)
    models.save(ill, tensors)
    return ill


def without(part: str) -> Callable[[models.Tensors], object]:
    return lambda held: [held.pop(name) for name in list(held) if part in name]


LOST = ["layers.1.self_attn.q_proj.weight", "layers.0.mlp.down_proj", "_proj.bias", "lm_head"]


@pytest.mark.parametrize("part", LOST)
@pytest.mark.parametrize("engine", ALL)
def test_tensors_that_an_engine_makes_up(
    pairs: Pairs, part: str, engine: EngineName, tmp_path: Path
) -> None:
    ill = damaged(pairs("qwen2"), tmp_path / "ill", without(part))
    assert codes(ill, engine) == {"engine-tensors"}
    words = said(ill, engine, "engine-tensors")
    silent = {"vllm": "random", "sglang": "random", "llama.cpp": "exports", "mlx": "refuses"}
    assert silent[engine] in words


def test_a_norm_that_vllm_refuses_to_miss(pairs: Pairs, tmp_path: Path) -> None:
    ill = damaged(pairs("llama"), tmp_path / "ill", without("model.norm"))
    assert "vLLM refuses" in said(ill, "vllm", "engine-tensors")
    assert "sglang silently uses random values" in said(ill, "sglang", "engine-tensors")


@pytest.mark.parametrize("name", ["model.layers.0.extra.weight", "value_head.weight"])
@pytest.mark.parametrize("engine", ALL)
def test_names_that_no_engine_knows(
    pairs: Pairs, name: str, engine: EngineName, tmp_path: Path
) -> None:
    ill = damaged(pairs("llama"), tmp_path / "ill", lambda held: held.update({name: torch.ones(3)}))
    assert codes(ill, engine) == {"engine-unknown-tensors"}


def test_a_bias_that_vllm_drops(pairs: Pairs, tmp_path: Path) -> None:
    bias = {"model.layers.0.self_attn.o_proj.bias": torch.ones(32)}
    ill = damaged(pairs("qwen2"), tmp_path / "ill", lambda held: held.update(bias))
    assert "vLLM silently drops" in said(ill, "vllm", "engine-unknown-tensors")
    assert "llama.cpp exports" in said(ill, "llama.cpp", "engine-unknown-tensors")


def test_a_head_that_the_config_ties(pairs: Pairs, tmp_path: Path) -> None:
    ill = pairs("llama").copy(tmp_path / "ill")
    edit_config(ill, tie_word_embeddings=True)
    assert "vLLM ignores lm_head.weight" in said(ill, "vllm", "engine-unknown-tensors")
    assert codes(ill, "llama.cpp") == set()


@pytest.mark.parametrize("engine", ALL)
def test_a_head_file_without_an_index(pairs: Pairs, engine: EngineName, tmp_path: Path) -> None:
    ill = pairs("llama").copy(tmp_path / "ill")
    save_file({"score.weight": torch.ones(1, 32)}, ill / "value_head.safetensors")
    globbed = engine in ("vllm", "sglang")
    assert codes(ill, engine) == ({"engine-files"} if globbed else set())
    below = Path(shutil.copytree(ill, tmp_path / "below"))
    (below / "heads").mkdir()
    (below / "value_head.safetensors").rename(below / "heads" / "value_head.safetensors")
    assert codes(below, engine) == set()
    # The run converted again, whose head has two layers.
    head = {f"value_head.{layer}.{part}": torch.ones(*(width, 32)[: 2 if part == "weight" else 1])
            for layer, width in ((0, 32), (2, 1)) for part in ("weight", "bias")}  # fmt: skip
    torch.save({**models.load(pairs("llama").healthy), **head}, tmp_path / "run.pt")
    again = tmp_path / "again"
    reshard.convert(tmp_path / "run.pt", again, base=pairs("llama").base, value_head="value_head")
    assert (again / "value_head.safetensors").is_file()
    assert codes(again, engine) == set()


def test_stale_shards_that_only_mlx_reads(pairs: Pairs, tmp_path: Path) -> None:
    pair, out = pairs("llama"), tmp_path / "out"
    reshard.convert(pair.healthy, out, base=pair.base, max_shard_size="20KB")
    shutil.copy(next(out.glob("model-00001*")), out / "model-00001-of-00099.safetensors")
    assert codes(out, "mlx") == {"engine-files"}
    assert codes(out, "vllm") == codes(out, "llama.cpp") == set()


def in_memory(name: str, folder: Path, version: str = "5.23") -> Path:
    """A folder with the names that a loaded model of some version has."""
    models.write(folder, name, 1)
    arrays = tables.random_arrays(tables.table(version, name).memory, 2)
    models.save(folder, {key: torch.from_numpy(value) for key, value in arrays.items()})
    return folder


@pytest.mark.parametrize(
    ("name", "effects"),
    [
        ("qwen2_5_vl", {"vllm": "", "sglang": "refuses", "llama.cpp": "", "mlx": ""}),
        ("qwen2_audio", {"vllm": "refuses", "sglang": "refuses", "llama.cpp": ""}),
        ("qwen3_moe", {"vllm": "", "sglang": "random", "llama.cpp": "", "mlx": "refuses"}),
        ("mixtral", {"vllm": "refuses", "mlx": "refuses"}),
        ("qwen3_vl_moe", {"vllm": "refuses", "sglang": "refuses", "llama.cpp": "transposed"}),
        ("gemma3", {"vllm": "refuses", "sglang": "refuses", "mlx": "refuses"}),
        ("llava", {"vllm": "refuses"}),
    ],
)
def test_names_of_a_loaded_model(name: str, effects: dict[EngineName, str], tmp_path: Path) -> None:
    ill = in_memory(name, tmp_path / "ill")
    for engine, effect in effects.items():
        assert ("engine-names" in codes(ill, engine)) == bool(effect), engine
        if effect:
            assert effect in said(ill, engine, "engine-names")
    assert reshard.convert(ill, tmp_path / "out", names="hub").verified
    for engine in effects:
        assert "engine-names" not in codes(tmp_path / "out", engine)


def test_a_layout_that_nobody_tried(tmp_path: Path) -> None:
    ill = in_memory("phimoe", tmp_path / "ill")
    assert codes(ill, "vllm") == {"engine-names-unread", "engine-class"}


def test_a_backbones_names(pairs: Pairs, tmp_path: Path) -> None:
    def change(held: models.Tensors) -> None:
        for name in list(held):
            held[name.removeprefix("model.")] = held.pop(name)

    ill = damaged(pairs("llama"), tmp_path / "ill", change)
    assert codes(ill, "vllm") == codes(ill, "mlx") == {"engine-names"}
    assert codes(ill, "llama.cpp") == set()


def test_classifiers_and_backbones(pairs: Pairs, tmp_path: Path) -> None:
    def change(held: models.Tensors) -> None:
        del held["lm_head.weight"]
        held["score.weight"] = torch.ones(1, 32)

    ill = damaged(pairs("qwen2"), tmp_path / "ill", change)
    edit_config(ill, architectures=["Qwen2ForSequenceClassification"])
    assert codes(ill, "vllm") == set()
    assert codes(ill, "sglang") == {"engine-score-bias"}
    assert codes(ill, "llama.cpp") == codes(ill, "mlx") == {"engine-class"}
    bare = damaged(pairs("qwen2"), tmp_path / "bare", without("lm_head"))
    edit_config(bare, architectures=["Qwen2Model"])
    assert all(codes(bare, engine) == {"engine-no-head"} for engine in ALL)


def test_fields_that_transformers_5_does_not_write(tmp_path: Path) -> None:
    for name in ("deepseek_v3", "qwen3_vl_moe", "qwen3_moe", "qwen2", "qwen3"):
        ill = tmp_path / name
        models.write(ill, name, 1)
        written = tables.table("5.23", name).config
        stated = json.loads((ill / "config.json").read_text())["architectures"]
        edit_config(ill, **dict.fromkeys(json.loads((ill / "config.json").read_text())))
        edit_config(ill, **{**written, "architectures": stated})
    expected: dict[str, dict[EngineName, str]] = {
        "deepseek_v3": {"vllm": "topk_method", "sglang": "topk_method", "mlx": ""},
        "qwen3_vl_moe": {"vllm": "norm_topk_prob", "sglang": "", "mlx": "num_experts"},
        "qwen3_moe": {"vllm": "", "mlx": "rope_theta"},
        "qwen2": {"vllm": "", "mlx": "rope_theta uses 1e+06"},
        "qwen3": {"vllm": "", "mlx": ""},
    }
    for name, engines in expected.items():
        for engine, field in engines.items():
            ill = tmp_path / name
            if field:
                assert codes(ill, engine) == {"engine-config"}, (name, engine)
            else:
                assert codes(ill, engine) == set(), (name, engine)
            words = said(ill, engine, "engine-config") if field else ""
            assert all(word in words for word in field.split(" ", 1)), words


def test_pickled_weights(pairs: Pairs, tmp_path: Path) -> None:
    ill = pairs("llama").copy(tmp_path / "ill")
    torch.save(models.load(ill), ill / "pytorch_model.bin")
    (ill / "model.safetensors").unlink()
    assert codes(ill, "mlx") == {"engine-files"}
    assert codes(ill, "vllm") == set()
    diagnosis = reshard.doctor(ill, engine="mlx", repair=tmp_path / "out")
    assert diagnosis.repaired
    assert not diagnosis.errors


def adapter(folder: Path, rank: int = 4, **settings: Any) -> Path:
    folder.mkdir()
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{name}.lora_A.weight": torch.ones(rank, 32),
               f"{name}.lora_B.weight": torch.ones(32, rank)}  # fmt: skip
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "base_model_name_or_path": "a/b"}
    (folder / "adapter_config.json").write_text(json.dumps({**config, **settings}))
    return folder


@pytest.mark.parametrize(
    ("settings", "engines"),
    [
        ({}, {"mlx"}),
        ({"use_dora": True}, {"vllm", "sglang", "mlx"}),
        ({"bias": "all"}, {"vllm", "mlx"}),
        ({"modules_to_save": ["lm_head"]}, {"vllm", "mlx"}),
        ({"modules_to_save": ["score"]}, {"mlx"}),
        ({"modules_to_save": 5}, {"mlx"}),
        ({"init_lora_weights": "pissa"}, {"vllm", "mlx"}),
        ({"rank": 17}, {"vllm", "mlx"}),
        ({"use_rslora": True}, {"sglang", "llama.cpp", "mlx"}),
        ({"rank_pattern": {"q_proj": 4}}, {"sglang", "mlx"}),
        ({"base_model_name_or_path": None}, {"llama.cpp", "mlx"}),
    ],
)
def test_adapter_folders(settings: dict[str, Any], engines: set[str], tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter", **settings)
    rank = settings.get("rank", 4)
    seen = reshard.doctor(folder, engine="vllm")
    assert (seen.num_tensors, seen.total_bytes) == (2, 2 * rank * 32 * 4)
    found = {engine: codes(folder, engine) for engine in ALL}
    assert {engine for engine in ALL if found[engine] == {"engine-adapter"}} == engines
    assert all(not found[engine] for engine in ALL if engine not in engines)


def test_the_flag(pairs: Pairs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ill = damaged(pairs("qwen2"), tmp_path / "ill", without("_proj.bias"))
    assert run(command, ["doctor", str(ill), "--for", "vllm"]) == 1
    assert "engine-tensors" in capsys.readouterr().out


def test_the_fields_are_written(pairs: Pairs, tmp_path: Path) -> None:
    """As the release has them, beside those of transformers 5, which reads both alike."""
    pair = pairs("qwen3_vl_moe")
    ill = pair.copy(tmp_path / "ill")
    config = json.loads((ill / "config.json").read_text())
    text = config["text_config"]
    theta, scaling = text.pop("rope_theta"), text.pop("rope_scaling")
    text["rope_parameters"] = {"rope_theta": theta, **scaling}
    text["num_local_experts"] = text.pop("num_experts")
    del text["norm_topk_prob"]
    edit_config(ill, text_config=text)
    repaired(ill, None, tmp_path / "out", "config-fields-missing")
    written = json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]
    assert {key: written[key] for key in ("rope_theta", "num_experts", "norm_topk_prob")} == {
        "rope_theta": theta, "num_experts": 3, "norm_topk_prob": True
    }  # fmt: skip
    assert written["rope_scaling"] == scaling
    models.assert_same_weights(tmp_path / "out", pair.healthy)
    one, other = (AutoConfig.from_pretrained(folder) for folder in (ill, tmp_path / "out"))
    assert one.text_config.rope_parameters == other.text_config.rope_parameters


def test_local_and_global_positions_of_gemma(tmp_path: Path) -> None:
    ill = tmp_path / "ill"
    models.write(ill, "gemma3_text", 1)
    config = json.loads((ill / "config.json").read_text())
    both = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e4}}  # fmt: skip
    keys = ("rope_theta", "rope_local_base_freq", "rope_scaling")
    edit_config(ill, **dict.fromkeys(key for key in keys if key in config), rope_parameters=both)
    repaired(ill, None, tmp_path / "out", "config-fields-missing")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [written[key] for key in keys] == [5e5, 2e4, {"rope_type": "linear", "factor": 8.0}]
