"""Reward models and critics: split, fitted and exported, they give the scores they gave before."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.numpy import save_file
from safetensors.torch import load_file

from reshard.core.tensors import Entry
from reshard.errors import IncompleteError, NamesError
from reshard.naming import FitOptions, NameMap, Schema, identity
from reshard.naming.rewards import (
    ModelParts,
    RewardHeads,
    RewardOptions,
    check,
    lightrft_state,
    reward_config,
    split,
)
from reshard.naming.value_heads import ValueHead, classifier
from tests.naming import tables
from tests.naming.lightrft_models import Critic, ScalarRewardModel, Wrapper, rewards_from
from tests.naming.make_layouts import FAMILIES, build
from tests.naming.tables import Fitted, fit

WIDTH = 32
IDS = torch.arange(3, 27).reshape(2, 12)
# The real class under LightRFT's wrapper, and the table of the base that is exported onto.
BACKBONES = {"srm_vl": ("qwen2_5_vl_backbone", "qwen2_5_vl"), "srm_al": ("qwen2_audio",) * 2}


class Saved:
    """The state dict of a module as a checkpoint: entries, and the files they lie in."""

    def __init__(self, module: Any, prefix: str = "") -> None:
        state = {prefix + k: v.numpy().copy() for k, v in module.state_dict().items()}
        self.entries = tables.entries({name: array.shape for name, array in state.items()})
        self.content = tables.files(state)

    def export(self, folder: Path, found: Fitted, schema: Schema) -> None:
        """Write a fit as a model folder, its config patched."""
        config = {**schema.config, "architectures": ["any"], **found.config_patches}
        (folder / "config.json").write_text(json.dumps(config))
        self.write(folder / "model.safetensors", found.entries)

    def write(self, path: Path, entries: Mapping[str, Entry]) -> None:
        arrays = {name: tables.values(entry, self.content) for name, entry in entries.items()}
        save_file(arrays, path, {"format": "pt"})


@pytest.mark.parametrize("pooling", ["attn", "last"])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("model_type", ["srm_vl", "srm_al"])
def test_scalar_rewards_are_the_same_after_the_export(
    model_type: Any, scaled: bool, pooling: Any, tmp_path: Path
) -> None:
    family, base = BACKBONES[model_type]
    schema = tables.table("4.57", base).schema()
    types = ("preference", "alignment")
    backbone = build(*FAMILIES[family]).eval()
    model = ScalarRewardModel(backbone, -1, WIDTH, types=types, pooling=pooling, scaled=scaled)
    with torch.no_grad():
        before = model(IDS)
    saved = Saved(model, "module.")
    options = RewardOptions(pooling, scaled, ("alignment", "preference"))
    parts = check(split(saved.entries, schema.specs), model_type, options)
    assert parts.rewards is not None
    found = fit(parts.backbone, schema, options=FitOptions(headless=model_type == "srm_vl"))
    assert found.matching.missing == (("lm_head.weight",) if model_type == "srm_vl" else ())
    saved.export(tmp_path, found, schema)
    saved.write(tmp_path / "reward_head.safetensors", parts.rewards.tensors)
    config = reward_config(parts.rewards, -1, schema.config)
    assert config == {
        "head_types": ["alignment", "preference"],
        "pooling_method": pooling,
        "num_heads": 4,
        "probing_layer": -1,
        "scale_for_train": scaled,
        "hidden_size": WIDTH,
    }

    class_ = type(backbone) if model_type == "srm_al" else transformers.AutoModel
    loaded, info = class_.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    heads = load_file(tmp_path / "reward_head.safetensors")
    with torch.no_grad():
        after = rewards_from(loaded.eval(), config, heads)(IDS)
    for kind in types:
        torch.testing.assert_close(after[kind], before[kind], rtol=0, atol=0)


def test_the_state_that_lightrft_loads_strictly() -> None:
    backbone = build(*FAMILIES["qwen2_5_vl_backbone"])
    model = ScalarRewardModel(
        backbone, -1, WIDTH, types=("preference",), pooling="attn", scaled=True
    )
    parts = split(Saved(model, "module.").entries)
    assert lightrft_state(parts).keys() == model.state_dict().keys()


def test_a_generative_reward_model_is_its_language_model() -> None:
    table = tables.table("4.57", "qwen2_5_vl")
    entries = Saved(Wrapper(build(*FAMILIES["qwen2_5_vl"]))).entries
    parts = check(split(entries, table.disk), "grm", RewardOptions())
    found = fit(parts.backbone, table.schema())
    assert found.prefix == "model."
    assert found.entries.keys() == table.disk.keys()


@pytest.mark.parametrize("head", ["score", "value_head"])
def test_a_critic_is_a_classifier_of_one_label(head: str, tmp_path: Path) -> None:
    schema = tables.table("4.57", "llama").schema()
    critic = Critic(build(*FAMILIES["llama_backbone"]).eval(), WIDTH, head)
    with torch.no_grad():
        before = critic(IDS)
    saved = Saved(critic)
    parts = split(saved.entries, schema.specs, None if head == "score" else head)
    parts = check(parts, "critic", RewardOptions())
    assert parts.value is not None
    found = fit(parts.backbone, schema, options=FitOptions(headless=True))
    patches = classifier(parts.value, ["LlamaForCausalLM"], speaks=False)
    assert patches is not None
    entries = {**found.entries, **parts.value.called("score")}
    whole = NameMap(identity(entries), config_patches=patches)
    saved.export(tmp_path, Fitted(entries, whole), schema)
    loaded, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, output_loading_info=True, dtype=torch.float32
    )
    assert type(loaded).__name__ == "LlamaForSequenceClassification"
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(IDS).logits, before[:, -1], rtol=0, atol=0)


def test_a_vision_language_critic_keeps_the_class_of_its_base() -> None:
    table = tables.table("4.57", "qwen2_5_vl")
    parts = split(Saved(Critic(build(*FAMILIES["qwen2_5_vl"]), WIDTH)).entries, table.disk)
    assert parts.value is not None
    assert parts.value.called("score").keys() == {"score.weight"}
    assert fit(parts.backbone, table.schema()).entries.keys() == table.disk.keys()
    classes = ["Qwen2_5_VLForConditionalGeneration"]
    assert classifier(parts.value, classes, speaks=False) is None


def test_a_head_that_the_base_has_is_no_value_head() -> None:
    table = tables.table("4.57", "llama_classifier")
    parts = split(tables.entries(table.memory), table.disk)
    assert parts.value is None
    assert fit(parts.backbone, table.schema()).entries.keys() == table.disk.keys()


# --- disagreements -----------------------------------------------------------------------------


def reward_parts(pooling: str = "attn", scaled: bool = True) -> ModelParts:
    model = ScalarRewardModel(
        torch.nn.Linear(2, 2), -1, 8, types=("preference",), pooling=pooling, scaled=scaled
    )
    return split(Saved(model).entries)


@pytest.mark.parametrize(
    ("parts", "model_type", "options", "words"),
    [
        (reward_parts(), "vision2seq", {}, r"reward heads \(preference\).*--model-type srm_vl"),
        (reward_parts(), "srm_al", {}, "--model-type srm_vl"),
        (reward_parts(), "srm_vl", {"pooling": "last"}, "has attention.*--pooling_method attn"),
        (reward_parts("last"), "srm_vl", {"pooling": "attn"}, "no attention.*--pooling_method la"),
        (reward_parts(), "srm_vl", {"scaled": False}, "a logit scale. Pass --scale_for_train"),
        (reward_parts(scaled=False), "srm_vl", {"scaled": True}, "Leave out --scale_for_train"),
        (reward_parts(), "srm_vl", {"types": ("alignment",)}, "--heads_types preference"),
        (ModelParts({}), "srm_vl", {}, "no reward or value head.*--model-type vision2seq or grm"),
        (
            ModelParts(
                {}, value=ValueHead("score", {"weight": tables.entry("score.weight", (1, 8))})
            ),
            "grm",
            {},
            "--model-type critic",
        ),
        (
            ModelParts({"model.audio_tower.w": tables.entry("w", (1,))}, reward_parts().rewards),
            "srm_vl",
            {},
            "--model-type srm_al",
        ),
    ],
)
def test_flags_that_disagree_with_the_checkpoint(
    parts: ModelParts, model_type: Any, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(NamesError, match=words):
        check(parts, model_type, RewardOptions(**options))


def test_flags_that_say_nothing_agree_with_everything() -> None:
    for parts in (reward_parts(), reward_parts("last", scaled=False)):
        assert check(parts, "srm_vl", RewardOptions()) == parts


def test_a_head_that_lacks_a_tensor() -> None:
    entries = tables.entries({"preference_head.0.weight": (8, 8), "preference_head.0.bias": (8,)})
    with pytest.raises(IncompleteError, match=r"preference_head\.1\.weight"):
        split(entries)


def test_a_head_of_another_width() -> None:
    shapes = {"p_head.0.weight": (8, 8), "p_head.0.bias": (8,), "p_head.1.weight": (8,),
              "p_head.3.weight": (1, 9)}  # fmt: skip
    with pytest.raises(NamesError, match=r"\(1, 9\).*\(1, 8\)"):
        split(tables.entries(shapes))


def test_a_head_without_dimensions() -> None:
    with pytest.raises(NamesError, match=r"its shape is \(\), a reward head of width 0"):
        split(tables.entries({"critic_head.0.weight": ()}))


def test_a_value_head_that_is_not_there() -> None:
    entries = tables.entries({"model.norm.weight": (8,), "v_head.weight": (1, 8)})
    with pytest.raises(NamesError, match=r"'value'.*in: v_head"):
        split(entries, value_head="value")


def test_a_base_of_another_size() -> None:
    heads = reward_parts().rewards
    assert isinstance(heads, RewardHeads)
    for layer in (-5, 4, 9):  # LightRFT's own bound
        with pytest.raises(NamesError, match=f"4 layers, probing layer {layer}.*-4 and 3"):
            reward_config(heads, layer, {"num_hidden_layers": 4})
    for layer in (-4, 3):
        assert reward_config(heads, layer, {"num_hidden_layers": 4})["probing_layer"] == layer
    with pytest.raises(NamesError, match="have width 8, but the base model has 16"):
        reward_config(heads, -1, {"hidden_size": 32, "text_config": {"hidden_size": 16}})
