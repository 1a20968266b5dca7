"""A trained reward model or critic of LightRFT, its scores, and the checks of what it becomes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch.distributed import checkpoint as dcp

import reshard
from reshard.cli.lightrft import ds2hf
from reshard.evaluate.reward import load_reward
from tests.models import released
from tests.models.reward_runs import RUNS, WIDTH
from tests.naming.lightrft_models import ScalarRewardModel

IDS = torch.arange(3, 27).reshape(2, 12)
EXACT = {"rtol": 1e-5, "atol": 1e-6}


class Trained:
    """A run: its base, the running wrapper with the weights that were saved, the checkpoint."""

    def __init__(self, name: str, saved: Path, folder: Path) -> None:
        self.run = RUNS[name]
        self.base = folder / "base"
        self.model: Any = self.run.build(self.base)
        self.model.load_state_dict(torch.load(saved / name / "truth.pt", weights_only=True))
        self.model.eval()
        self.checkpoint = saved / name / "checkpoint"

    @property
    def backbone_class(self) -> str:
        return self.run.backbone

    def scores(self) -> Any:
        with torch.no_grad():
            return self.model(IDS)

    def ds2hf(self, out: Path, *flags: str) -> None:
        """Convert as a LightRFT user does."""
        arguments = ["--checkpoint_dir", self.checkpoint, "--output_dir", out, "--hf_base",
                     self.base, *flags]  # fmt: skip
        invoke(ds2hf.command, arguments)

    def dcp(self, folder: Path) -> Path:
        """The same weights as FSDP saves them."""
        dcp.save(self.model.state_dict(), checkpoint_id=folder, no_dist=True)
        return folder


def invoke(command: Any, arguments: list[Any]) -> str:
    """Run a command in this process; its errors are raised."""
    done = CliRunner().invoke(command, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


Get = Callable[[str], Trained]
SRM_FLAGS = {
    "srm-vl": ["--model_type", "srm_vl", "--pooling_method", "attn", "--scale_for_train",
               "--heads_types", "preference", "alignment", "--probing_layer", "-1"],
    "srm-al": ["--model_type", "srm_al", "--pooling_method", "last"],
}  # fmt: skip


def check_scores(run: Trained, out: Path) -> None:
    """The export, put together by the code of `reshard try`, gives the wrapper's scores."""
    backbone = released.load(out, run.backbone_class)
    found = load_reward(out, backbone).score(
        {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    )
    before = run.scores()
    assert found.keys() == before.keys()
    for kind, score in before.items():
        torch.testing.assert_close(found[kind], score.squeeze(-1), **EXACT)
        assert 0 < float(score[0]) != float(score[1]) < 1


def check_lightrft(run: Trained, out: Path) -> None:
    """LightRFT's way: the wrapper around the folder's model, then its own state dict, strictly."""
    state = torch.load(out / "pytorch_model.bin", weights_only=True)
    backbone = getattr(transformers, run.backbone_class).from_pretrained(out)
    assert run.run.heads is not None
    model = ScalarRewardModel(backbone, -1, WIDTH, **run.run.heads)
    model.load_state_dict(state, strict=True)
    with torch.no_grad():
        for kind, score in model.eval().float()(IDS).items():
            torch.testing.assert_close(score, run.scores()[kind], **EXACT)


def check_compared(run: Trained, out: Path) -> None:
    """`verify --against` and `diff` read every file of the folder that holds tensors."""
    stated = json.loads((out / "reshard.json").read_text())
    count = len(stated["tensors"]) + sum(map(len, stated.get("beside", {}).values()))
    for base in (None, run.base):
        assert reshard.verify(out, run.checkpoint, base=base).num_tensors == count
    assert reshard.diff(run.checkpoint, out).same
    shutil.copytree(out, out.with_name("other"))
    for file in stated.get("beside", {}):
        path = out.with_name("other") / file
        if path.suffix == ".safetensors":
            values = load_file(path)
            changed = max(values)
            save_file({**values, changed: values[changed] + 1}, path)
        else:
            values = torch.load(path, weights_only=True)
            changed = max(values)
            torch.save({**values, changed: values[changed] + 1}, path)
        found = reshard.diff(out, out.with_name("other"))
        assert any(changed in difference.name for difference in found.differences)
        with pytest.raises(reshard.VerificationError, match=changed):
            reshard.verify(out.with_name("other"), run.checkpoint)
    shutil.rmtree(out.with_name("other"))
