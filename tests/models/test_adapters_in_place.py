"""Adapters that LightRFT's models inject in place, without PEFT's prefix, or wrap themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import reshard
from reshard.conversion.options import SrmFormat
from tests.models import released
from tests.models.peft_runs import ALPHA, IDS, RANK, peft
from tests.naming.lightrft_models import ScalarRewardModel

# --- LightRFT's scalar reward models: layers injected in place, without PEFT's prefix ----------


class InPlace:
    """A scalar reward model whose backbone got adapters in place."""

    def __init__(self, folder: Path) -> None:
        values = released.values("qwen2_5_vl", seed=0)
        self.base = released.write(folder / "base", "qwen2_5_vl", values)
        self.backbone = released.loaded(self.base, "AutoModel")
        self.model = self.wrapper(self.backbone)
        config = peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=r".*language_model.*(q_proj|down_proj)"
        )
        peft.inject_adapter_in_model(config, self.backbone)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn_like(parameter) / 4)
        self.model.eval()
        self.checkpoint = folder / "model.pt"
        torch.save(self.model.state_dict(), self.checkpoint)

    @staticmethod
    def wrapper(backbone: nn.Module) -> Any:
        return ScalarRewardModel(
            backbone, -1, 32, types=("preference",), pooling="attn", scaled=True
        )

    def scores(self) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = self.model(IDS)["preference"]
        return found


@pytest.fixture(scope="module")
def in_place(tmp_path_factory: pytest.TempPathFactory) -> InPlace:
    return InPlace(tmp_path_factory.mktemp("in-place"))


def test_layers_in_place_are_merged(in_place: InPlace, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = reshard.convert(
        in_place.checkpoint, out, base=in_place.base, model_type="srm_vl", lora_alpha=ALPHA
    )
    assert report.merged == 4
    state = torch.load(out / "pytorch_model.bin", weights_only=True)
    model = in_place.wrapper(released.load(out, "AutoModel"))
    model.load_state_dict(state, strict=True)
    with torch.no_grad():
        score = model.eval()(IDS)["preference"]
    torch.testing.assert_close(score, in_place.scores(), rtol=1e-4, atol=1e-5)


def test_layers_in_place_as_an_adapter(in_place: InPlace, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options: dict[str, Any] = {"base": in_place.base, "lora": "adapter", "lora_alpha": ALPHA}
    with pytest.raises(reshard.PlanError, match="44 tensors outside the adapter differ"):
        reshard.convert(in_place.checkpoint, out, **options)
    options["allow"] = ["model.layers.*", "visual.*", "model.embed_tokens.weight", "model.norm.*"]
    report = reshard.convert(in_place.checkpoint, out, **options)
    files = {path.name for path in out.iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "reshard.json",
                     "reward_config.json", "reward_head.safetensors"}  # fmt: skip
    backbone = {n for n in in_place.model.state_dict() if n.startswith("model.")}
    written = [load_file(path) for path in out.glob("*.safetensors")]
    assert report.num_tensors == sum(map(len, written))
    assert not {name for state in written for name in state} & backbone
    assert any("are not written" in warning for warning in report.warnings)
    assert backbone
    with pytest.raises(reshard.PlanError, match="--lora merge"):
        reshard.convert(in_place.checkpoint, tmp_path / "no", srm_format="lightrft", **options)


# --- LightRFT's audio reward models: PEFT's own wrapper inside LightRFT's ------------------------


@pytest.mark.parametrize("srm_format", ["both", "lightrft"])
def test_a_merged_backbone_has_the_names_of_one_without_adapters(
    srm_format: SrmFormat, tmp_path: Path
) -> None:
    """LightRFT loads `pytorch_model.bin` strictly into a model that PEFT has not wrapped."""
    name = "Qwen2AudioForConditionalGeneration"
    base = released.write(tmp_path / "base", "qwen2_audio", released.values("qwen2_audio", seed=0))
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=r".*language_model.*(q_proj|down_proj)"
    )
    backbone = peft.get_peft_model(released.loaded(base, name), config)
    model = InPlace.wrapper(backbone).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.copy_(torch.randn_like(parameter) / 4)
        scores = model(IDS)["preference"]
    assert "model.base_model.model.lm_head.weight" in model.state_dict()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    report = reshard.convert(
        tmp_path / "model.pt", tmp_path / "out", base=base, model_type="srm_al",
        lora_alpha=ALPHA, srm_format=srm_format,
    )  # fmt: skip
    assert report.merged == 4
    state = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    plain = InPlace.wrapper(released.loaded(base, name)).eval()
    plain.load_state_dict(state, strict=True)
    with torch.no_grad():
        torch.testing.assert_close(plain(IDS)["preference"], scores, rtol=1e-4, atol=1e-5)
    reshard.verify(tmp_path / "out", tmp_path / "model.pt", base=base)
