"""What a conversion's report says: the checkpoint, the adapter, idle options, the next command."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import reshard
from reshard.cli.app import reshard as command
from reshard.cli.app import run
from reshard.conversion.base_model import changed_fields
from tests.budget import needs_proc, peak
from tests.golden.table import HERE as GOLDEN
from tests.oracle.cache import Oracle

Shown = pytest.CaptureFixture[str]


def codes(report: reshard.Report) -> list[str]:
    return [found.code for found in report.findings]


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ({"allow": ["visul.*"]}, "allow-unmatched", "--allow 'visul.*' matches no name"),
        ({"allow": ["model.norm.*"]}, "option-idle", "is in the checkpoint and in the base"),
        ({"lora_alpha": 16}, "no-adapters", "--lora-alpha: no effect"),
        ({"lora": "merge", "lora_alpha": 1}, "no-adapters", "--lora, --lora-alpha: no effect"),
        ({"exclude_frozen": True}, "option-idle", "no frozen parameters"),
        ({"fill_from_base": True}, "option-idle", "lacks nothing"),
        ({"probing_layer": 2}, "option-idle", "--probing-layer has no effect"),
        ({"srm_format": "split"}, "option-idle", "--srm-format has no effect"),
    ],
)
def test_an_option_without_effect_is_a_finding(
    oracle: Oracle, options: dict[str, Any], code: str, words: str, tmp_path: Path
) -> None:
    case = oracle["llama-zero2"]
    report = reshard.convert(case.root, tmp_path / "out", base=case.base, dry_run=True, **options)
    found = [f for f in report.findings if f.code == code]
    assert len(found) == 1, report.findings
    assert words in found[0].message
    strict = {**options, "strict": [code]}
    with pytest.raises(reshard.PlanError, match=code):
        reshard.convert(case.root, tmp_path / "out", base=case.base, **strict)


def test_options_that_have_an_effect_are_no_findings(oracle: Oracle, tmp_path: Path) -> None:
    case, out = oracle["llama-zero2"], tmp_path / "out"
    report = reshard.convert(case.root, out, base=case.base, strict=True, allow_unchanged=True)
    assert report.findings == ()
    lora = oracle["lora-tied-zero3"]
    report = reshard.convert(
        lora.root, tmp_path / "lora", base=lora.base, lora_alpha=6, fill_from_base=True
    )
    assert not {"no-adapters", "option-idle", "allow-unmatched"} & set(codes(report))
    plain = reshard.convert(case.root, tmp_path / "p", transformers_version="4.57", dry_run=True)
    assert codes(plain) == ["option-idle", "no-base"]


def test_a_pattern_that_is_needed_is_no_finding(oracle: Oracle, tmp_path: Path) -> None:
    case = oracle["llama-zero2"]
    shutil.copytree(case.base, tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    from safetensors.numpy import save_file

    tensors["visual.proj.weight"] = tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    report = reshard.convert(
        case.root, tmp_path / "out", base=tmp_path / "base", allow=["visual.*", "visul.*"]
    )
    assert codes(report) == ["allow-unmatched"]
    assert "visul" in report.findings[0].message


def test_the_scripts_defaults_are_no_findings(
    oracle: Oracle, tmp_path: Path, capsys: Shown
) -> None:
    from reshard.cli.lightrft.ds2hf import command as ds2hf

    case = oracle["llama-zero2"]
    arguments = ["--checkpoint_dir", str(case.root), "--hf_base", str(case.base)]
    assert run(ds2hf, [*arguments, "--output_dir", str(tmp_path / "out")]) == 0
    assert "no effect" not in capsys.readouterr().err


def test_the_report_names_the_adapter(oracle: Oracle, tmp_path: Path, capsys: Shown) -> None:
    case, out = oracle["lora-zero2"], tmp_path / "out"
    report = reshard.convert(case.root, out, base=case.base, lora_alpha=6)
    adapter = report.adapter
    assert adapter is not None
    assert (adapter.name, adapter.alpha, adapter.modules) == ("default", 6, report.merged)
    assert adapter.scaling == 6 / adapter.ranks[0]
    assert report.to_json()["adapter"] == {
        "name": "default", "ranks": list(adapter.ranks), "alpha": 6.0,
        "scaling": adapter.scaling, "modules": report.merged, "rslora": False,
    }  # fmt: skip
    arguments = ["convert", str(case.root), str(out), "--base", str(case.base), "--overwrite"]
    assert run(command, [*arguments, "--lora-alpha", "6"]) == 0
    assert f"default (rank {adapter.ranks[0]}, alpha 6, scaling" in capsys.readouterr().out
    case = oracle["llama-zero2"]
    assert reshard.convert(case.root, tmp_path / "plain", base=case.base).adapter is None


def test_the_report_names_the_very_checkpoint(
    oracle: Oracle, tmp_path: Path, capsys: Shown
) -> None:
    shutil.copytree(oracle["two-tags"].root, tmp_path / "run" / "_actor")
    report = reshard.convert(tmp_path / "run", tmp_path / "out")
    assert report.source == str(tmp_path / "run")
    assert report.checkpoint == str(tmp_path / "run" / "_actor" / "global_step2")
    assert report.tag == "global_step2"
    for number in (5, 10):
        shutil.copytree(GOLDEN / "dcp" / "checkpoint", tmp_path / "hft" / f"checkpoint-{number}")
    arguments = ["convert", str(tmp_path / "hft"), str(tmp_path / "dcp"), "--json"]
    assert run(command, arguments) == 0
    stated = json.loads(capsys.readouterr().out)
    assert stated["checkpoint"] == str(tmp_path / "hft" / "checkpoint-10")
    assert stated["tag"] == "checkpoint-10"
    assert run(command, [*arguments[:2], str(tmp_path / "again"), "--tag", "checkpoint-5"]) == 0
    shown = capsys.readouterr().out
    assert f"{tmp_path}/hft/checkpoint-5 (dcp, tag checkpoint-5)" in shown
    direct = reshard.convert(tmp_path / "hft" / "checkpoint-5", tmp_path / "direct")
    assert direct.tag is None
    same = [tmp_path / name / "reshard.json" for name in ("again", "direct")]
    assert same[0].read_bytes() == same[1].read_bytes()


@pytest.mark.parametrize("dry", [True, False])
def test_without_a_base_the_last_line_says_what_completes_the_folder(
    oracle: Oracle, dry: bool, tmp_path: Path, capsys: Shown
) -> None:
    case, out = oracle["llama-zero2"], tmp_path / "my out"
    arguments = [str(case.root), str(out), "--dtype", "bf16", "--tag", case.last.path.name]
    assert run(command, ["convert", *arguments, *["--dry-run"] * dry]) == 0
    shown = capsys.readouterr()
    assert "cannot load it" not in shown.err
    last = shown.out.splitlines()[-1]
    assert last.startswith(f"warning: {out} holds only weights")
    words = shlex.split(last.partition("To complete it: ")[2])
    assert words[:3] == ["reshard", "convert", str(case.root)]
    assert ("--overwrite" in words) != dry
    words[words.index("MODEL")] = str(case.base)
    assert run(command, words[1:]) == 0
    assert (out / "config.json").is_file()
    assert reshard.verify(out, case.root).num_tensors
    report = reshard.convert(out, tmp_path / "copy")
    assert codes(report) == []  # a whole model's own files go along
    assert reshard.diff(tmp_path / "copy", out).same
    assert (tmp_path / "copy" / "config.json").is_file()


class TestDryRun:
    def test_it_says_what_would_come_along_and_change(self, oracle: Oracle, tmp_path: Path) -> None:
        case, out = oracle["llama-zero2"], tmp_path / "out"
        planned = reshard.convert(case.root, out, base=case.base, dtype="float32", dry_run=True)
        rows = dict(planned.rows())
        assert rows["copied"] == f"{', '.join(planned.copied)}, from the base"
        assert rows["config"] == "dtype 'bfloat16' -> 'float32'"
        assert planned.to_json()["config"] == {"dtype": ["bfloat16", "float32"]}
        made = reshard.convert(case.root, out, base=case.base, dtype="float32")
        assert made.memory is None
        assert (made.copied, made.config) == (planned.copied, planned.config)
        assert "copied" not in dict(made.rows())
        written = {path.name for path in out.iterdir()}
        assert written == {*made.copied, *made.files, "config.json", "reshard.json"}

    def test_a_field_that_goes_or_comes_is_said(self, tmp_path: Path) -> None:
        given = {"a": 1, "part": {"b": [1]}, "gone": {"c": 2}}
        base = SimpleNamespace(config=given)
        text = json.dumps({"a": 1, "part": {"b": [1], "new": "x"}}).encode()
        changed = changed_fields(base, text)  # type: ignore[arg-type]
        assert changed == {"gone.c": (2, None), "part.new": (None, "x")}

    @pytest.mark.heavy
    @needs_proc
    def test_the_memory_that_it_states_is_what_a_run_takes(self, tmp_path: Path) -> None:
        tensors = {f"w.{i}": np.ones((1 << 20,), np.float32) for i in range(48)}
        (tmp_path / "src").mkdir()
        save_file(tensors, tmp_path / "src" / "model.safetensors")
        code = """
import reshard
report = reshard.convert(sys.argv[1], sys.argv[2], threads=2, dtype="bfloat16",
                         dry_run=sys.argv[3] == "dry")
if report.memory is not None:
    open(sys.argv[4], "w").write(str(report.memory))
"""
        said = tmp_path / "said"
        peak(code, tmp_path / "src", tmp_path / "out", "dry", said)
        took = peak(code, tmp_path / "src", tmp_path / "out", "wet", said)
        assert 0.85 < int(said.read_text()) / took < 1.4
