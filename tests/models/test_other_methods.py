"""PEFT's other methods: refused by name, by their config or by their tensors alone.

What the error advises is done: where PEFT can merge the method, the merged model converts.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import reshard
from reshard.naming.lora.methods import METHODS
from tests.models.test_adapter_traps import IDS, llama, plain

TARGET: dict[str, Any] = {"target_modules": ["q_proj"]}
CONFIGS: dict[str, Any] = {
    "ADALORA": peft.AdaLoraConfig(total_step=9, **TARGET),
    "BOFT": peft.BOFTConfig(boft_block_size=4, **TARGET),
    "DELORA": peft.DeloraConfig(**TARGET),
    "FOURIERFT": peft.FourierFTConfig(n_frequency=10, **TARGET),
    "HRA": peft.HRAConfig(**TARGET),
    "IA3": peft.IA3Config(feedforward_modules=[], **TARGET),
    "LN_TUNING": peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "LOHA": peft.LoHaConfig(**TARGET),
    "LOKR": peft.LoKrConfig(**TARGET),
    "OFT": peft.OFTConfig(oft_block_size=4, **TARGET),
    "PREFIX_TUNING": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    "PROMPT_TUNING": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    "RANDLORA": peft.RandLoraConfig(**TARGET),
    "TRAINABLE_TOKENS": peft.TrainableTokensConfig(token_indices=[1, 2]),
    "VERA": peft.VeraConfig(**TARGET),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_refused_by_name_and_converted_once_peft_has_merged_it(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, method = llama(), METHODS[name]
    model.save_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, CONFIGS[name])
        with torch.no_grad():
            for key, parameter in wrapped.named_parameters():
                if parameter.requires_grad and "indices" not in key:
                    parameter.add_(torch.randn_like(parameter) / 50)
        wrapped.save_pretrained(tmp_path / "saved")
    options: dict[str, Any] = {"base": tmp_path / "base", "fill_from_base": True}
    with pytest.raises(reshard.UnsupportedError, match=f"method {method.title}") as caught:
        reshard.convert(tmp_path / "saved", tmp_path / "out", **options)
    assert "--allow" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    # Without a config, by the tensors: learned prompts do not say which of them they are.
    torch.save(wrapped.state_dict(), tmp_path / "full.bin")
    title = method.title if name not in ("PREFIX_TUNING", "PROMPT_TUNING") else "prompt tuning"
    with pytest.raises(reshard.UnsupportedError, match=f"method {title}"):
        reshard.convert(tmp_path / "full.bin", tmp_path / "out", lora_alpha=8, **options)
    if not method.merges:
        assert "PEFT cannot merge it either" in str(caught.value)
        assert not hasattr(wrapped.base_model, "merge_and_unload")
        return
    assert "merge_and_unload" in str(caught.value)
    wrapped.eval()
    with torch.no_grad():
        expected = wrapped(IDS).logits
        merged = wrapped.merge_and_unload()
        torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-3, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    reshard.convert(tmp_path / "merged", tmp_path / "out", base=tmp_path / "base")


def test_a_config_of_tomorrow_is_read_with_a_finding(tmp_path: Path) -> None:
    import json

    state = {"q_proj.weight": torch.ones(4, 4)}
    base = plain(tmp_path / "base", state)
    run = {f"base_model.model.q_proj.lora_{side}.weight": torch.eye(4) for side in "AB"}
    folder = tmp_path / "adapter"
    folder.mkdir()
    torch.save(run, folder / "adapter_model.bin")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "use_tomorrow": True}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    report = reshard.convert(folder, tmp_path / "out", base=base, fill_from_base=True)
    found = [finding for finding in report.findings if finding.code == "adapter-setting-unknown"]
    assert "use_tomorrow" in found[0].message
