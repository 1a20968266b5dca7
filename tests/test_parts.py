"""What a nested state dict holds beside the model, and the hints that lead to it."""

from __future__ import annotations

import re
import shlex
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch.distributed import checkpoint as dcp

import reshard
from reshard.cli.app import reshard as command
from reshard.formats.deepspeed import proof
from reshard.naming.judge import FitOptions, pattern_of


def torch_save(content: dict[str, Any], path: Path) -> Path:
    torch.save(content, path.with_suffix(".pt"))
    return path.with_suffix(".pt")


def dcp_save(content: dict[str, Any], path: Path) -> Path:
    dcp.save(content, checkpoint_id=path, no_dist=True)
    return path


def weights(value: float) -> dict[str, torch.Tensor]:
    return {"a.weight": torch.full((2, 3), value), "b.weight": torch.full((4,), value)}


SAVES = pytest.mark.parametrize("save", [torch_save, dcp_save])
Save = Callable[[dict[str, Any], Path], Path]


@SAVES
def test_another_model_beside_it_is_a_finding(save: Save, tmp_path: Path) -> None:
    content = {
        "model": weights(1),
        "ema": weights(2),
        "reference": weights(3),
        "optimizer": {"state": {"a.weight": {"exp_avg": torch.ones(2, 3)}}},
    }
    source = save(content, tmp_path / "run")
    report = reshard.convert(source, tmp_path / "out")
    left = {f.subject: f for f in report.findings if f.code == "part-left-out"}
    assert left.keys() == {"ema", "reference"}
    for subject, value in (("ema", 2), ("reference", 3)):
        assert f"--prefix {subject}." in left[subject].fix
        assert_converted(source, tmp_path / subject, subject, value)


def assert_converted(source: Path, out: Path, prefix: str, value: float) -> None:
    reshard.convert(source, out, prefix=prefix)
    for name, tensor in load_file(out / "model.safetensors").items():
        expected = weights(value)[name.removeprefix(f"{prefix}.")]
        assert torch.equal(tensor, expected)


@SAVES
def test_an_average_alone_is_named_and_no_optimizer(save: Save, tmp_path: Path) -> None:
    source = save({"ema": weights(2)}, tmp_path / "run")
    with pytest.raises(reshard.ReshardError, match=r"unless you name one: ema\. .*--prefix ema\.$"):
        reshard.convert(source, tmp_path / "out")
    assert_converted(source, tmp_path / "out", "ema", 2)


@SAVES
def test_an_optimizer_is_called_so(save: Save, tmp_path: Path) -> None:
    moments = {"exp_avg": torch.ones(2, 3), "exp_avg_sq": torch.ones(2, 3)}
    content = {"state": {"a.weight": moments}, "param_groups": [{"lr": 0.1}]}
    source = save(content, tmp_path / "run")
    with pytest.raises(reshard.ReshardError, match="the state of an optimizer, but no model"):
        reshard.convert(source, tmp_path / "out")


@pytest.mark.parametrize(
    "name", ["odd\nname: float32 (2,)", "\x1b[31mred", "it's; $(x)", "a" * 500, "[ab]?", "wéight"]
)
def test_the_pattern_of_a_hint_leaves_the_name_out(name: str, tmp_path: Path) -> None:
    """As a shell reads it: what a file calls its tensors must not end the quotes."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}", encoding="utf-8")
    save_file(weights(1), base / "model.safetensors")
    source = torch_save(weights(2) | {name: torch.ones(2)}, tmp_path / "run")
    with pytest.raises(reshard.NamesError) as caught:
        reshard.convert(source, tmp_path / "out", base=base)
    hint = str(caught.value.hint)
    assert len(hint) < 500
    assert hint.isprintable()
    words = shlex.split(hint[hint.index("--allow") :].removesuffix("."))
    assert len(words) == 2, words
    assert words == ["--allow", pattern_of(name)]
    report = reshard.convert(source, tmp_path / "out", base=base, allow=words[1:])
    assert report.unexpected == (name,)
    assert not FitOptions(allow=tuple(words[1:])).allows("a.weight")


def test_a_pattern_that_would_leave_out_more_is_not_advised(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}", encoding="utf-8")
    save_file(weights(1), base / "model.safetensors")
    source = torch_save(weights(2) | {"a.w\neight": torch.ones(2)}, tmp_path / "run")
    with pytest.raises(reshard.NamesError) as caught:
        reshard.convert(source, tmp_path / "out", base=base)
    assert "--allow 'a.w?eight'" in str(caught.value.hint)
    other = torch_save(weights(2) | {"a\nweight": torch.ones(2)}, tmp_path / "other")
    with pytest.raises(reshard.NamesError, match="--allow PATTERN"):
        reshard.convert(other, tmp_path / "out", base=base)


@pytest.mark.parametrize(
    "url", ["s3a://bucket/out", "hdfs://host/model", "gcs://bucket/x", "file:///x"]
)
def test_a_url_is_no_folder_called_so(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = torch_save(weights(1), tmp_path / "run")
    for given in (url, Path(url)):
        for function in (
            lambda path: reshard.convert(source, path),
            lambda path: reshard.convert(path, "out"),
            lambda path: reshard.convert(source, "out", base=path),
            reshard.open,
        ):
            with pytest.raises(reshard.OptionError, match="is a URL"):
                function(given)
    for words in (["convert", str(source), url], ["inspect", url]):
        result = CliRunner().invoke(command, words)
        assert result.exit_code == 2
        assert f"{url} is a URL" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["run.pt"]
    assert reshard.convert(source, "./s3:").verified


def test_no_pattern_of_a_nan_makes_the_proof_warn() -> None:
    for bits in (0x7F800001, 0x7FC00000, 0xFFFFFFFF):
        values = np.array([bits, 0], np.uint32).view(np.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert proof._same(values, values)
            assert not proof._same(values, np.zeros(2, np.float32))


def test_the_lines_of_adapters_that_stand_alone_are_lines(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}", encoding="utf-8")
    save_file(weights(1), base / "model.safetensors")
    source = torch_save(
        {
            "base_model.model.a.lora_A.default.weight": torch.ones(1, 3),
            "base_model.model.a.lora_B.default.weight": torch.ones(2, 1),
        },
        tmp_path / "run",
    )
    with pytest.raises(reshard.NamesError) as caught:
        reshard.convert(source, tmp_path / "out", base=base, lora_alpha=2)
    said = str(caught.value)
    assert re.search(r"not the weights that they update\. .*:\n  a\.weight|\n  b\.weight\n", said)
    assert "\\n" not in said
