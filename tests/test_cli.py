"""The command line: exit codes, JSON, plain errors, and an environment without torch."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from reshard import OptionError, convert
from reshard import open as open_checkpoint
from reshard.cli.app import reshard, run
from reshard.cli.lightrft.ds2hf import command as ds2hf
from reshard.cli.lightrft.fsdp2hf import command as fsdp2hf
from tests.oracle.cache import Oracle


def test_convert_prints_a_table_and_exits_with_0(
    oracle: Oracle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = oracle["llama-tied-zero3"]
    out = tmp_path / "out"
    assert run(reshard, ["convert", str(case.root), str(out), "--base", str(case.base)]) == 0
    shown = capsys.readouterr()
    assert "verified" in shown.out
    assert "lm_head.weight = model.embed_tokens.weight" in shown.out
    assert (out / "model.safetensors").is_file()


def test_convert_json_is_one_object_with_the_contracts_keys(
    oracle: Oracle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = oracle["llama-zero2"]
    arguments = ["convert", str(case.root), str(tmp_path / "out"), "--base", str(case.base)]
    assert run(reshard, [*arguments, "--json"]) == 0
    shown = capsys.readouterr()
    report = json.loads(shown.out)
    assert shown.err == ""
    assert report.keys() >= {
        "source", "target", "num_tensors", "bytes_read", "bytes_written", "seconds", "verified",
        "missing", "unexpected", "tied",
    }  # fmt: skip
    written = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert report["bytes_written"] == written
    assert report["verified"] is True
    assert report["missing"] == report["unexpected"] == []


def test_dry_run_writes_nothing(
    oracle: Oracle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = oracle["llama-zero2"]
    arguments = ["convert", str(case.root), str(tmp_path / "out"), "--base", str(case.base)]
    assert run(reshard, [*arguments, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dry_run"] is True
    assert list(tmp_path.iterdir()) == []


def test_inspect_json_holds_what_the_contract_says(
    oracle: Oracle, capsys: pytest.CaptureFixture[str]
) -> None:
    case = oracle["zero2-bf16-w3"]
    assert run(reshard, ["inspect", str(case.root), "--tensors", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    facts = case.last.facts
    expected = case.last.expected()
    assert found["format"] == "deepspeed"
    assert found["version"] == facts["deepspeed"]
    assert found["tag"] == "global_step2"
    assert found["world_size"] == 3
    assert found["zero_stage"] == 2
    assert found["num_tensors"] == len(expected)
    assert found["total_bytes"] == sum(value.nbytes for value in expected.values())
    files = [path for path in case.last.path.rglob("*") if path.is_file()]
    assert found["bytes_on_disk"] == sum(path.stat().st_size for path in files)
    assert found["bytes_to_read"] == found["total_bytes"]
    assert found["num_parameters"] == sum(
        value.size for name, value in expected.items() if name not in facts["buffers"]
    )
    tensors = {tensor["name"]: tensor for tensor in found["tensors"]}
    assert tensors.keys() == expected.keys() | facts["tied"].keys()
    for name, value in expected.items():
        assert tensors[name]["shape"] == list(value.shape)
        assert tensors[name]["nbytes"] == value.nbytes
    for name in facts["tied"]:
        assert tensors[name]["kind"] == "tied"


def test_inspect_prints_a_table(oracle: Oracle, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(reshard, ["inspect", str(oracle["zero3-bf16-w2"].root), "--tensors"]) == 0
    shown = capsys.readouterr().out
    assert re.search(
        r"^is +DeepSpeed checkpoint, deepspeed [\d.]+, ZeRO-3, 2 ranks, step ", shown, re.M
    )


@pytest.mark.parametrize(("before", "after"), [([], []), (["--debug"], []), ([], ["--debug"])])
def test_a_users_mistake_is_one_paragraph_and_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], before: list[str], after: list[str]
) -> None:
    arguments = ["convert", str(tmp_path / "nothing"), str(tmp_path / "out")]
    assert run(reshard, [*before, *arguments, *after]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "nothing: there is no such file or folder." in shown.err
    traced = bool(before or after)
    assert ("Traceback" in shown.err) == traced
    assert len(shown.err.splitlines()) == 1 or traced


@pytest.mark.parametrize(
    "arguments",
    [["convert"], ["convert", "a", "b", "--threads", "0"], ["frobnicate"], ["inspect", "--x"]],
)
def test_wrong_usage_is_exit_code_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(reshard, arguments) == 2
    assert "Usage:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max-shard-size", "foo"], "error: --max-shard-size: 'foo' is not a size"),
        (["--base", "b", "--lora-alpha", "nan"], "--lora-alpha: nan is not a positive number"),
        (["--prefix", ""], "--prefix: '' is not a text that is not empty"),
        (["--max-shard-size", "0"], "a size must be positive"),
        (["--transformers-version", "abc"], "'abc' is not a version of transformers"),
        (["--dtype", "base"], "needs a base"),
        (["--fill-from-base"], "--fill-from-base: no effect without a base"),
        (["--srm-format", "split", "--allow", "x"], "--srm-format, --allow: no effect"),
        (["--value-head", "v", "--lora-alpha", "1"], "--value-head, --lora-alpha: no effect"),
        (["--adapter", "a", "--adapter-config", "c"], "--adapter-config, --adapter: no effect"),
        (["--model-type", "grm", "--probing-layer", "2"], "--model-type, --probing-layer: "),
        (["--pooling-method", "attn", "--heads-types", "a"], "--pooling-method, --heads-types: "),
        (["--no-scale-for-train", "--allow-unchanged"], "--scale-for-train, --allow-unchanged: "),
    ],
)
def test_an_option_at_fault_is_exit_code_2(
    oracle: Oracle,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    words: str,
) -> None:
    root = oracle["llama-zero2"].root
    assert run(reshard, ["convert", str(root), str(tmp_path / "out"), *flags]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"max_shard_size": 1.5},
        {"max_shard_size": 0},
        {"threads": 0},
        {"pooling_method": "mean"},
        {"heads_types": "preference"},
    ],
)
def test_the_api_checks_its_options_too(
    oracle: Oracle, tmp_path: Path, options: dict[str, Any]
) -> None:
    case = oracle["llama-zero2"]
    with pytest.raises(OptionError):
        convert(case.root, tmp_path / "out", base=case.base, **options)


@pytest.mark.parametrize("rest", [["--base", "b"], [], ["--"]])
def test_a_flag_for_several_values_needs_one(
    rest: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(reshard, ["convert", "a", "b", "--heads-types", *rest]) == 2
    assert "--heads-types needs at least one value" in capsys.readouterr().err


def test_no_path_is_no_folder(
    oracle: Oracle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    root = str(oracle["llama-zero2"].root)
    assert run(reshard, ["convert", root, ""]) == 2
    assert run(reshard, ["inspect", ""]) == 2
    assert run(reshard, ["convert", root, "."]) == 1  # the folder that the shell is in
    assert tmp_path.is_dir()
    assert not list(tmp_path.iterdir())


def test_a_tilde_that_the_shell_left_is_the_home(
    oracle: Oracle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = oracle["llama-zero2"]
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, folder in (("run", case.root), ("base", case.base)):
        (tmp_path / name).symlink_to(folder)
    assert run(reshard, ["convert", "~/run", "~/out", "--base=~/base"]) == 0
    flags = ["--checkpoint_dir=~/run", "--hf_base=~/base", "--output_dir=~/again"]
    assert run(ds2hf, flags) == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert (tmp_path / "again" / "model.safetensors").is_file()


def test_a_script_says_where_the_flag_is_that_an_error_advises(
    oracle: Oracle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = oracle["lora-zero2"]
    flags = ["--checkpoint_dir", str(case.root), "--hf_base", str(case.base)]
    assert run(ds2hf, [*flags, "--output_dir", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert "Pass --lora-alpha, or --adapter-config" in said
    assert "(--adapter-config: see `reshard convert --help`, which does the same.)" in said


def test_fill_from_base_is_advised_and_taken_by_the_script_itself(
    oracle: Oracle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = oracle["lora-tied-zero3"]  # saved with exclude_frozen_parameters
    flags = ["--checkpoint_dir", str(case.root), "--hf_base", str(case.base), "--lora-alpha", "6"]
    assert run(ds2hf, [*flags, "--output_dir", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.endswith("take them from the base: --fill-from-base.\n")
    for number, flag in enumerate(("--fill-from-base", "--fill_from_base")):
        out = tmp_path / str(number)
        assert run(ds2hf, [*flags, "--output_dir", str(out), flag]) == 0
        assert set(open_checkpoint(out).tensors) == set(open_checkpoint(case.base).tensors)


def test_a_script_says_where_the_names_that_the_base_lacks_are_allowed(
    oracle: Oracle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = oracle["llama-zero2"]
    names = {**load_file(case.base / "model.safetensors"), "value.weight": np.zeros((1, 2))}
    convert_from = tmp_path / "extra"
    convert_from.mkdir()
    save_file(names, convert_from / "model.safetensors")
    convert(convert_from, tmp_path / "dcp", to="dcp")
    flags = ["--checkpoint_dir", str(tmp_path / "dcp"), "--hf_base", str(case.base)]
    assert run(fsdp2hf, [*flags, "--output_dir", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert "pass --allow 'value.*'. If it is a critic's head, pass --value-head value." in said
    assert "(--allow: see `reshard convert --help`, which does the same.)" in said
    flags = [*flags, "--value-head", "value"]
    assert run(fsdp2hf, [*flags, "--output_dir", str(tmp_path / "out")]) == 0
    assert load_file(tmp_path / "out" / "value_head.safetensors").keys() == {"value.weight"}


def test_a_script_is_not_called_around_its_check(
    oracle: Oracle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder above a checkpoint is looked into before it is said to be of the right format."""
    (tmp_path / "runs").mkdir()
    convert(oracle["llama-zero2"].root, tmp_path / "runs" / "step-1", to="dcp")
    flags = ["--hf_base", str(oracle["llama-zero2"].base), "--output_dir", str(tmp_path / "out")]
    assert run(ds2hf, ["--checkpoint_dir", str(tmp_path / "runs"), *flags]) == 1
    assert "Convert it with fsdp2hf" in capsys.readouterr().err


def test_a_script_names_the_checkpoint_below_a_model_that_it_does_not_convert(
    oracle: Oracle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The HF Trainer's run: the last model, above the checkpoints of the training."""
    case, run_folder = oracle["llama-zero2"], tmp_path / "run"
    shutil.copytree(case.base, run_folder)
    shutil.copytree(case.root, run_folder / "checkpoint-2")
    flags = ["--hf_base", str(case.base), "--output_dir", str(tmp_path / "out")]
    assert run(ds2hf, ["--checkpoint_dir", str(run_folder), *flags]) == 1
    assert f"Below it there is one: {run_folder / 'checkpoint-2'}." in capsys.readouterr().err


def test_what_is_left_out_without_a_base_is_reported(oracle: Oracle, tmp_path: Path) -> None:
    root = oracle["zero3-bf16-w2"].root
    report = convert(root, tmp_path / "out", exclude_frozen=True)
    assert report.missing
    assert not set(report.missing) & set(open_checkpoint(tmp_path / "out").tensors)


def test_verify_finds_what_changed(
    oracle: Oracle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(reshard, ["convert", str(oracle["llama-zero2"].root), str(out)]) == 0
    assert run(reshard, ["verify", str(out)]) == 0
    with (out / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x77")
    capsys.readouterr()
    assert run(reshard, ["verify", str(out)]) == 1
    assert "digest" in capsys.readouterr().err


def test_ds2hf_takes_the_contracts_flags(oracle: Oracle, tmp_path: Path) -> None:
    case = oracle["two-tags"]
    oracle_base = oracle["llama-zero2"]
    arguments = ["--checkpoint_dir", str(oracle_base.root), "--hf_base", str(oracle_base.base)]
    assert run(ds2hf, [*arguments, "--output_dir", str(tmp_path / "a")]) == 0
    tagged = [*arguments, "--output_dir", str(tmp_path / "b"), "-t", "global_step2"]
    assert run(ds2hf, [*tagged, "--exclude_frozen_parameters"]) == 0
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (
        tmp_path / "b" / "model.safetensors"
    ).read_bytes()
    wrong = ["--checkpoint_dir", str(case.root), "--hf_base", str(oracle_base.base)]
    assert run(ds2hf, [*wrong, "--output_dir", str(tmp_path / "c"), "-t", "none"]) == 1
    assert run(ds2hf, wrong) == 2
