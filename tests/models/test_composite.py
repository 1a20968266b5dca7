"""Parts of composite models that were trained by themselves, back into their bases.

The parts are loaded models of the installed transformers. What comes out is loaded by the class of
the whole, whose part must hold the trained tensors, bit for bit, and compute what it computed.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.models import qwen2_5_omni, qwen3_omni_moe

import reshard
from reshard.naming import FitOptions, to_memory
from tests.models import released
from tests.naming import tables

State = dict[str, torch.Tensor]
IDS = torch.arange(3, 23).reshape(2, 10)
TEXT: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ROUTED = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}  # fmt: skip
QWEN3_VISION = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32,
    "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
}  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
AUDIO = {
    "d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 32,
    "output_dim": 32, "num_mel_bins": 8, "max_source_positions": 32, "n_window": 4,
}  # fmt: skip


def shuffled(model: Any, seed: int) -> Any:
    """The model with small values that no two tensors share."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.normal_(std=0.2)
    return model.eval()


def into(base: Path, state: State, folder: Path) -> Path:
    """Convert a part's state dict onto its base, by the hint of the error that comes first."""
    torch.save(state, folder / "run.pt")
    with pytest.raises(reshard.NamesError, match="--fill-from-base"):
        reshard.convert(folder / "run.pt", folder / "out", base=base)
    options: dict[str, Any] = {"base": base, "fill_from_base": True}
    try:
        report = reshard.convert(folder / "run.pt", folder / "out", **options)
    except reshard.PlanError as error:
        # The class has no head: the whole's goes with a trained embedding by its name only.
        if "--allow" not in str(error):
            raise
        options["allow"] = [error.tensor]
        report = reshard.convert(folder / "run.pt", folder / "out", **options)
    assert report.filled
    reshard.verify(folder / "out", folder / "run.pt")
    return folder / "out"


def check_part(out: Path, base: Path, whole: str, name: str, trained: Any) -> Any:
    """The part `name` of the whole holds what was trained, and all the rest is the base's."""
    loaded = released.load(out, whole)
    part = loaded.get_submodule(name)
    held = part.state_dict()
    assert len(held) > 5
    for key, value in held.items():
        assert torch.equal(value, trained.state_dict()[key]), key
    within = {f"{name}.{key}" for key in held}
    for key, value in released.load(base, whole).state_dict().items():
        if key not in within and not key.endswith("lm_head.weight"):
            assert torch.equal(loaded.state_dict()[key], value), key
    return loaded


# Released layout of the base, its class, the class of the part, and the part within the whole.
RELEASED = {
    "gemma3": ("Gemma3ForCausalLM", "model.language_model"),
    "mistral3": ("MistralForCausalLM", "model.language_model"),
    "llava": ("LlamaForCausalLM", "model.language_model"),
    "llava_next_mixtral": ("MixtralForCausalLM", "model.language_model"),
    "internvl": ("Qwen2ForCausalLM", "model.language_model"),
    "internvl_moe": ("Qwen3MoeForCausalLM", "model.language_model"),
    "qwen2_audio": ("Qwen2ForCausalLM", "model.language_model"),
    "qwen3_vl": ("Qwen3ForCausalLM", "model.language_model"),
}


@pytest.mark.parametrize("backbone", [False, True], ids=["causal", "backbone"])
@pytest.mark.parametrize("name", RELEASED)
def test_the_language_model_of_a_composite_base(name: str, backbone: bool, tmp_path: Path) -> None:
    class_name, part = RELEASED[name]
    base = released.write(tmp_path / "base", name, released.values(name, seed=0))
    whole = released.class_of(name)
    text = transformers.AutoConfig.from_pretrained(base).get_text_config()
    text_class = getattr(transformers, class_name)
    if not isinstance(text, text_class.config_class):
        kept = {k: v for k, v in text.to_dict().items() if k != "model_type"}
        text = text_class.config_class(**kept)
    trained = shuffled(text_class._from_config(text), seed=2)
    state = (trained.model if backbone else trained).state_dict()
    out = into(base, dict(state), tmp_path)
    loaded = check_part(out, base, whole, part, trained.model)
    if not backbone:
        with torch.no_grad():
            found, expected = loaded(input_ids=IDS).logits, trained(input_ids=IDS).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def whole_on_disk(kind: str, seed: int) -> tuple[Any, State, dict[str, Any]]:
    """A thinker of a tiny omni model, and the files and config of the whole it belongs to.

    Its own files, which transformers writes, lie under `thinker.` there; talker and vocoder are
    stood for by a tensor each.
    """
    text = {**TEXT, "rope_parameters": MROPE}
    if kind == "Qwen2_5Omni":
        vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4,
                  "out_hidden_size": 32, "fullatt_block_indexes": [0]}  # fmt: skip
        del text["head_dim"]
        modeling: Any = qwen2_5_omni.modeling_qwen2_5_omni
    else:
        text |= ROUTED
        vision = QWEN3_VISION
        modeling = qwen3_omni_moe.modeling_qwen3_omni_moe
    class_ = getattr(modeling, f"{kind}ThinkerForConditionalGeneration")
    config = class_.config_class(text_config=text, vision_config=vision, audio_config=AUDIO)
    model = shuffled(class_._from_config(config), seed)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        saved = load_file(Path(folder) / "model.safetensors")
        stated = json.loads((Path(folder) / "config.json").read_text())
    files = {f"thinker.{name}": value for name, value in saved.items()}
    files |= {"talker.model.norm.weight": torch.rand(8), "token2wav.norm.weight": torch.rand(8)}
    model_type = stated["model_type"].removesuffix("_thinker")
    return model, files, {"model_type": model_type, "thinker_config": stated}


@pytest.mark.parametrize("kind", ["Qwen2_5Omni", "Qwen3OmniMoe"])
def test_the_thinker_of_an_omni_model(kind: str, tmp_path: Path) -> None:
    _, before, config = whole_on_disk(kind, seed=0)
    trained, after, _ = whole_on_disk(kind, seed=2)
    base = tmp_path / "base"
    base.mkdir()
    save_file(before, base / "model.safetensors", {"format": "pt"})
    (base / "config.json").write_text(json.dumps(config))
    out = into(base, dict(trained.state_dict()), tmp_path)
    written = load_file(out / "model.safetensors")
    assert written.keys() == before.keys()
    for name, value in written.items():
        expected = after if name.startswith("thinker.") else before
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("version", ["4.57", "5.23"])
def test_kimi_k2_alone_and_in_a_composite_base(version: str) -> None:
    """Its model type is none of transformers; it is trained as DeepSeek-V3, or as it is."""
    disk, memory = (tables.table(v, "deepseek_v3") for v in ("4.57", version))
    text = {**disk.config, "model_type": "kimi_k2"}
    found = tables.fit(tables.entries(memory.memory), tables.schema(disk.disk_shapes(), text))
    assert found.entries.keys() == disk.disk.keys()
    whole = {f"language_model.{name}": shape for name, shape in disk.disk_shapes().items()}
    config = {"model_type": "kimi_k25", "text_config": text}
    schema = tables.schema({**whole, "vision_tower.patch.weight": (3, 3)}, config)
    options = FitOptions(fill_from_base=True)
    found = tables.fit(tables.entries(memory.memory), schema, options=options)
    assert found.entries.keys() == whole.keys()
    assert found.matching.filled == ("vision_tower.patch.weight",)
    if version == "4.57":
        loaded = to_memory(tables.entries(disk.disk_shapes()), text, (5, 23))
        assert loaded.keys() == disk.disk.keys()  # its own code has the files' names


def config_of(name: str) -> tuple[Any, Any]:
    """Of a composite model of transformers 5: its class and a tiny config."""
    text: dict[str, Any] = {**TEXT}
    vision: dict[str, Any] = QWEN3_VISION
    more: dict[str, Any] = {}
    if name == "Llama4":
        text |= {
            "intermediate_size_mlp": 48,
            "num_local_experts": 2,
            "interleave_moe_layer_step": 1,
        }
        vision = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 1,
                  "num_attention_heads": 4, "image_size": 28, "patch_size": 14,
                  "vision_output_dim": 32, "projector_input_dim": 32,
                  "projector_output_dim": 32}  # fmt: skip
    else:
        text |= {**LINEAR, "rope_parameters": MROPE, "num_hidden_layers": 4}
        vision = {k: v for k, v in vision.items() if k != "deepstack_visual_indexes"}
    if name == "Qwen3_5Moe":
        text |= ROUTED
    class_ = getattr(transformers, f"{name}ForConditionalGeneration")
    return class_, class_.config_class(text_config=text, vision_config=vision, **more)


@pytest.mark.parametrize("name", ["Llama4", "Qwen3_5", "Qwen3_5Moe"])
def test_the_language_model_of_a_base_that_transformers_writes(name: str, tmp_path: Path) -> None:
    class_, config = config_of(name)
    base = tmp_path / "base"
    shuffled(class_._from_config(config), seed=0).save_pretrained(base)
    text_class = getattr(transformers, f"{name}ForCausalLM")
    trained = shuffled(text_class._from_config(config.text_config), seed=2)
    out = into(base, dict(trained.state_dict()), tmp_path)
    part = "language_model.model" if name == "Llama4" else "model.language_model"
    loaded = check_part(out, base, class_.__name__, part, trained.model)
    head = loaded.get_output_embeddings().weight
    assert torch.equal(head, trained.lm_head.weight)
