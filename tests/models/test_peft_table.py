"""Every LoRA setting of PEFT's own table of tests: merged as PEFT merges it, or refused by name.

The models are those of `tests/test_custom_models.py` of PEFT in small: linear layers, an embedding,
transformers' Conv1D, convolutions, attention. One setting a case; both a state dict of the wrapped
model and the folder that PEFT saves are converted.
"""

from __future__ import annotations

import pytest

pytest.importorskip("peft")

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora import config as lora
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import reshard

State = dict[str, torch.Tensor]


class Mlp(nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 20)
        self.lin1 = nn.Linear(20, 2)


class EmbConv1D(nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(100, 5)
        self.conv1d = Conv1D(1, 5)
        self.square = Conv1D(5, 5)
        self.lin0 = nn.Linear(10, 2)


class Convolutions(nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.conv1d = nn.Conv1d(4, 8, 2)
        self.conv2d = nn.Conv2d(4, 8, 3)
        self.grouped = nn.Conv2d(4, 8, 3, groups=2)
        self.conv3d = nn.Conv3d(4, 8, 3)
        self.lin0 = nn.Linear(10, 2)


class Attention(nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2)
        self.lin0 = nn.Linear(8, 2)


def case(model: type[nn.Module], *, refused: str = "", **settings: Any) -> Any:
    name = ", ".join(f"{key}={value}" for key, value in settings.items())
    return pytest.param(model, settings, refused, id=f"{model.__name__}: {name}"[:90])


CASES = [
    case(Mlp, target_modules="lin0"),
    case(Mlp, target_modules=["lin0"]),
    case(Mlp, target_modules=["lin1"]),
    case(Mlp, target_modules=["lin0", "lin1"]),
    case(Mlp, target_modules=["lin0"], modules_to_save=["lin1"]),
    case(Mlp, target_modules=["lin0"], lora_alpha=4, lora_dropout=0.1),
    case(Mlp, target_modules=["lin0"], use_dora=True),
    case(Mlp, target_modules=["lin0", "lin1"], use_dora=True),
    case(Mlp, target_modules="lin1", use_dora=True, lora_alpha=32),
    case(Mlp, target_modules=["lin0"], use_dora=True, use_rslora=True),
    case(Mlp, target_modules=["lin0"], kasa_config=lora.KasaConfig(), r=4, refused="KaSA"),
    case(Mlp, target_modules=["lin0"], init_lora_weights="mica", r=4),
    case(Mlp, target_modules=["lin0"], init_lora_weights="orthogonal", r=4),
    case(Mlp, target_modules=["lin0"], init_lora_weights="gaussian"),
    case(Mlp, target_modules=["lin0"],
         velora_config=lora.VeloraConfig(num_groups=2, init_type="random")),
    case(Mlp, target_modules=["lin0", "lin1"],
         velora_config=lora.VeloraConfig(num_groups=2, init_type="batch_average")),
    case(Mlp, target_modules=["lin0"],
         velora_config=lora.VeloraConfig(num_groups=2, init_type="batch_average_once")),
    case(Mlp, target_modules=["lin0"], monteclora_config=lora.MontecloraConfig(num_samples=2)),
    case(Mlp, target_modules=["lin0", "lin1"], use_rslora=True, rank_pattern={"lin1": 2}),
    case(Mlp, target_modules=["lin0", "lin1"], alpha_pattern={"^lin[1-9]$": 32},
         rank_pattern={r"(in|l)\w*0": 3}),
    case(Mlp, target_modules=["lin0"], bias="all"),
    case(Mlp, target_modules=["lin0"], bias="lora_only"),
    case(EmbConv1D, target_modules=["conv1d"]),
    case(EmbConv1D, target_modules=["square"]),
    case(EmbConv1D, target_modules=["emb"]),
    case(EmbConv1D, target_modules=["emb", "conv1d", "square"]),
    case(EmbConv1D, target_modules=["conv1d", "square"], use_dora=True),
    case(EmbConv1D, target_modules=["emb"], use_dora=True),
    case(EmbConv1D, target_modules=["emb", "conv1d"], use_dora=True, use_rslora=True),
    case(EmbConv1D, target_modules=["emb"], init_lora_weights="mica", r=4),
    case(EmbConv1D, target_modules=["conv1d"], trainable_token_indices={"emb": [0, 10]},
         refused="trainable tokens"),
    case(Convolutions, target_modules=["conv1d"], refused="convolutions"),
    case(Convolutions, target_modules=["conv1d"], use_dora=True, refused="convolutions"),
    case(Convolutions, target_modules=["conv2d"], refused="convolutions"),
    case(Convolutions, target_modules=["conv2d", "lin0"], use_dora=True, refused="convolutions"),
    case(Convolutions, target_modules=["grouped"], refused="convolutions"),
    case(Convolutions, target_modules=["conv3d", "lin0"], refused="convolutions"),
    case(Mlp, target_modules=["lin0", "lin1"], lora_bias=True, lora_alpha=32,
         refused="a bias of their own"),
    case(Convolutions, target_modules=["conv2d"], lora_bias=True, refused="a bias of their own"),
    case(Attention, target_modules=["mha"], refused="MultiheadAttention"),
    case(Attention, target_modules=["mha", "lin0"], refused="MultiheadAttention"),
    case(Mlp, target_modules=[], target_parameters=["lin0.weight"], refused="target_parameters"),
    case(Mlp, target_modules=["lin0"], target_parameters=["lin1.weight"],
         refused="target_parameters"),
]  # fmt: skip


class Run:
    """A small model, its base folder, and what training with a setting leaves of it."""

    def __init__(self, make: Callable[[], nn.Module], settings: dict[str, Any], at: Path) -> None:
        torch.manual_seed(0)
        model, self.base = make(), at / "base"
        self.base.mkdir()
        (self.base / "config.json").write_text(json.dumps({"model_type": "custom"}))
        state = {name: value.clone() for name, value in model.state_dict().items()}
        save_file(state, self.base / "model.safetensors", {"format": "pt"})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model = peft.get_peft_model(model, peft.LoraConfig(r=2, **settings)
                                             if "r" not in settings
                                             else peft.LoraConfig(**settings))  # fmt: skip
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) / 4)
        self.saved, self.full = at / "adapter", at / "full"
        self.model.save_pretrained(self.saved)
        self.full.mkdir()
        torch.save(self.model.state_dict(), self.full / "pytorch_model.bin")
        (self.full / "adapter_config.json").write_bytes(
            (self.saved / "adapter_config.json").read_bytes()
        )

    def merged(self) -> State:
        """What PEFT merges of the trained model itself: a plain state dict."""
        found: State = self.model.merge_and_unload().state_dict()
        return found


@pytest.mark.parametrize(("make", "settings", "refused"), CASES)
def test_merged_as_by_peft_or_refused_by_name(
    make: Callable[[], nn.Module], settings: dict[str, Any], refused: str, tmp_path: Path
) -> None:
    run = Run(make, settings, tmp_path)
    sources = {"full": run.full, "saved": run.saved}
    if refused:
        for source in sources.values():
            with pytest.raises(reshard.UnsupportedError, match=refused) as caught:
                reshard.convert(source, tmp_path / "out", base=run.base, fill_from_base=True)
            assert "--allow" not in str(caught.value)
        if "grouped" in settings["target_modules"]:
            assert "PEFT cannot merge it either" in str(caught.value)
            with pytest.raises(NotImplementedError):
                run.merged()
            return
        # The hint: what PEFT merges and saves is converted.
        assert "merge_and_unload" in str(caught.value)
        state = {name: value.contiguous() for name, value in run.merged().items()}
        save_file(state, tmp_path / "merged.safetensors")
        reshard.convert(tmp_path / "merged.safetensors", tmp_path / "merged", base=run.base)
        return
    for name, source in sources.items():
        reshard.convert(source, tmp_path / "out" / name, base=run.base, fill_from_base=True)
    merged = run.merged()
    for name in sources:
        written = load_file(tmp_path / "out" / name / "model.safetensors")
        assert written.keys() == merged.keys()
        for key, value in merged.items():
            torch.testing.assert_close(written[key], value, rtol=2e-6, atol=2e-6, msg=key)
