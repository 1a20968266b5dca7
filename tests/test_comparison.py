"""`verify --against` and `diff`: two checkpoints of any formats, tensor by tensor."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import reshard
from reshard.cli.app import reshard as command
from reshard.cli.app import run
from reshard.conversion.options import DTypeChoice, Lora, To
from tests.oracle.cache import Oracle

LLAMAS = ["llama-zero2", "llama-tied-zero3"]


@pytest.mark.parametrize("name", LLAMAS)
def test_a_conversion_is_verified_against_its_source(
    oracle: Oracle, name: str, tmp_path: Path
) -> None:
    case = oracle[name]
    out = tmp_path / "out"
    report = reshard.convert(case.root, out, base=case.base)
    assert reshard.verify(out, against=case.root).num_tensors == report.num_tensors
    assert run(command, ["verify", str(out), "--against", str(case.last.path)]) == 0


def test_one_changed_element_is_found_though_the_digests_were_changed_too(
    oracle: Oracle, tmp_path: Path
) -> None:
    case = oracle["llama-zero2"]
    out = tmp_path / "out"
    reshard.convert(case.root, out, base=case.base)
    with (out / "model.safetensors").open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    (out / "reshard.json").unlink()
    with pytest.raises(reshard.VerificationError, match=r"1 of \d+ elements differ"):
        reshard.verify(out, against=case.root)
    assert run(command, ["verify", str(out), "--against", str(case.root)]) == 1


def test_an_older_save_is_another_checkpoint(oracle: Oracle, tmp_path: Path) -> None:
    case = oracle["two-tags"]
    reshard.convert(case.root, tmp_path / "out", tag="global_step1")
    reshard.verify(tmp_path / "out", against=case.root, tag="global_step1")
    with pytest.raises(reshard.VerificationError):
        reshard.verify(tmp_path / "out", against=case.root, tag="global_step2")


def test_a_checkpoint_equals_itself_in_another_format(oracle: Oracle, tmp_path: Path) -> None:
    case = oracle["llama-zero3"]
    reshard.convert(case.root, tmp_path / "dcp", to="dcp")
    comparison = reshard.diff(case.root, tmp_path / "dcp")
    assert comparison.same
    assert comparison.num_equal == len(reshard.open(case.root).catalog.entries)


@pytest.mark.parametrize("fill", [False, True])
@pytest.mark.parametrize("excluded", [False, True])
@pytest.mark.parametrize("base", [False, True])
def test_what_the_base_gave_is_told_from_what_the_checkpoint_holds(
    oracle: Oracle, fill: bool, excluded: bool, base: bool, tmp_path: Path
) -> None:
    """Adapters, merged into frozen weights: left out, filled from the base, or merged alone."""
    case, out = oracle["lora-zero2"], tmp_path / "out"
    reshard.convert(
        case.root, out, base=case.base, lora_alpha=6, fill_from_base=fill, exclude_frozen=excluded
    )
    written = load_file(out / "model.safetensors")
    merged = 4
    filled = len(written) - merged if fill and excluded else 0
    found = reshard.verify(out, case.root, base=case.base if base else None)
    assert found.num_filled == (0 if base else filled)
    assert found.num_tensors == len(written) - found.num_filled
    for name in ("model.layers.0.self_attn.q_proj.weight", min(written)):
        if name in written and not (filled and not base and "q_proj" not in name):
            value = written[name].copy()
            value.view(np.uint16).flat[3] ^= 1
            save_file({**written, name: value}, out / "model.safetensors", {"format": "pt"})
            with pytest.raises(reshard.VerificationError, match=rf"{name}.*1 of \d+ elements"):
                reshard.verify(out, case.root, base=case.base if base else None)


@pytest.mark.parametrize("lora", ["adapter", "both"])
def test_an_adapter_folder_is_verified(oracle: Oracle, lora: Lora, tmp_path: Path) -> None:
    case, out = oracle["lora-zero2"], tmp_path / "out"
    reshard.convert(case.root, out, base=case.base, lora=lora, lora_alpha=6)
    stated = json.loads((out / "reshard.json").read_text())
    count = len(stated["tensors"]) + sum(map(len, stated["beside"].values()))
    if lora == "both":
        assert reshard.verify(out, case.root).num_tensors == count
    else:
        with pytest.raises(reshard.PlanError, match="Pass --base"):
            reshard.verify(out, case.root)
    assert reshard.verify(out, case.root, base=case.base).num_tensors == count
    path = next(out.rglob("adapter_model.safetensors"))
    values = load_file(path)
    name = min(values)
    save_file({**values, name: values[name] * 2}, path, {"format": "pt"})
    with pytest.raises(reshard.VerificationError, match=name):
        reshard.verify(out, case.root, base=case.base)


@pytest.mark.parametrize("to", ["hf", "dcp"])
@pytest.mark.parametrize("same", [True, False])
def test_a_head_that_was_stored_twice_is_compared(
    oracle: Oracle, to: To, same: bool, tmp_path: Path
) -> None:
    """FSDP stores a tied head beside the embedding; the output stores it once."""
    base = oracle["llama-tied-zero3"].base
    values = load_file(base / "model.safetensors")
    assert "lm_head.weight" not in values
    values = {name: value + 1 for name, value in values.items()}
    trained = tmp_path / "trained"
    trained.mkdir()
    head = values["model.embed_tokens.weight"].copy()
    save_file({**values, "lm_head.weight": head}, trained / "model.safetensors", {"format": "pt"})
    out = tmp_path / "out"
    reshard.convert(trained, out, base=base, to=to)
    if not same:
        head[0, 0] += 1
        path = trained / "model.safetensors"
        save_file({**values, "lm_head.weight": head}, path, {"format": "pt"})
        with pytest.raises(reshard.ReshardError, match=r"lm_head\.weight"):
            reshard.verify(out, trained)
        return
    found = reshard.verify(out, trained)
    assert found.num_tensors == len(values) + (to == "dcp")
    assert reshard.diff(trained, out).same


def test_names_that_no_config_explains_need_the_base(oracle: Oracle, tmp_path: Path) -> None:
    case, out = oracle["lora-zero2"], tmp_path / "dcp"
    reshard.convert(case.root, out, base=case.base, lora_alpha=6, to="dcp")
    with pytest.raises(reshard.PlanError, match="names exist on one side only"):
        reshard.verify(out, case.root)
    assert reshard.verify(out, case.root, base=case.base).num_tensors


def test_a_folder_that_holds_nothing_of_the_checkpoint_is_not_verified(
    oracle: Oracle, tmp_path: Path
) -> None:
    case, out = oracle["llama-zero2"], tmp_path / "out"
    reshard.convert(case.root, out, base=case.base)
    stated = json.loads((out / "reshard.json").read_text())
    stated["names"]["filled"] = list(stated["tensors"])
    (out / "reshard.json").write_text(json.dumps(stated))
    assert reshard.verify(out, case.root).num_filled == 0  # it is compared nonetheless


def test_a_damaged_reshard_json_is_one_error(oracle: Oracle, tmp_path: Path) -> None:
    case, out = oracle["llama-zero2"], tmp_path / "out"
    reshard.convert(case.root, out, base=case.base)
    good = json.loads((out / "reshard.json").read_text())
    for part, key, value in (
        ("options", "allow", 3),
        ("options", "allow", ["**.**.**.**.**.**.x"]),
        ("options", "probing_layer", float("inf")),
        ("options", "srm_format", "none"),
        ("options", "value_head", 3),
        ("names", "lora", {"alpha": "much"}),
        ("names", "lora", {"alpha": 10**400, "rslora": 0, "alphas": {}, "fan_in_fan_out": 0}),
        ("names", "unexpected", 1),
    ):
        changed = {**good, part: {**good[part], key: value}}
        (out / "reshard.json").write_text(json.dumps(changed))
        with pytest.raises(reshard.FormatError, match=r"reshard\.json: it is damaged"):
            reshard.verify(out, case.root)


def test_a_prefix_is_taken_off_before_the_comparison(oracle: Oracle, tmp_path: Path) -> None:
    root = oracle["llama-zero2"].root
    reshard.convert(root, tmp_path / "out", prefix="model")
    assert reshard.verify(tmp_path / "out", root, prefix="model").num_tensors


def test_flags_that_choose_what_to_compare_with(tmp_path: Path) -> None:
    for flag in ("--tag", "--prefix", "--base"):
        assert run(command, ["verify", str(tmp_path), flag, "x"]) == 2
    with pytest.raises(reshard.PlanError, match="Pass --against"):
        reshard.verify(tmp_path, tag="x")


def test_a_difference_is_json_too(
    oracle: Oracle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case, out = oracle["llama-zero2"], tmp_path / "out"
    reshard.convert(case.root, out)
    values = load_file(out / "model.safetensors")
    name = max(values)
    save_file({**values, name: values[name] + 1}, out / "model.safetensors", {"format": "pt"})
    for more in ([], ["--against", str(case.root)]):
        assert run(command, ["verify", str(out), "--json", *more]) == 1
        found = json.loads(capsys.readouterr().out)
        assert (found["verified"], found["tensor"]) == (False, name)
        assert name in found["message"]
        assert found["requests"] is None  # local folders, as in the JSON of every command


def test_diff_measures_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {
        "same": np.arange(6, dtype=np.float32),
        "moved": np.zeros((2, 3), np.float32),
        "shape": np.zeros(3, np.float32),
        "dtype": np.zeros(3, np.int64),
        "gone": np.zeros(1, np.float32),
        "nan": np.array([np.nan, 1], np.float32),
    }
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    save_file(values, tmp_path / "a" / "model.safetensors")
    changed = dict(values)
    del changed["gone"]
    changed["moved"] = np.array([[0, 0, 0.5], [0, 0, -1.5]], np.float32)
    changed["shape"] = np.zeros(4, np.float32)
    changed["dtype"] = np.zeros(3, np.int32)
    changed["new"] = np.zeros(1, np.float32)
    save_file(changed, tmp_path / "b" / "model.safetensors")
    assert run(command, ["diff", str(tmp_path / "a"), str(tmp_path / "b"), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    by_name = {difference["name"]: difference for difference in found["differences"]}
    assert found["num_equal"] == 2
    assert {name: d["kind"] for name, d in by_name.items()} == {
        "moved": "values",
        "shape": "shape",
        "dtype": "dtype",
        "gone": "only in the first",
        "new": "only in the second",
    }
    moved = by_name["moved"]
    assert (moved["differing"], moved["largest"], moved["mean"]) == (2, 1.5, 1.0)
    assert run(command, ["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    assert "2 tensors are equal, 5 differ" in capsys.readouterr().out
    assert run(command, ["diff", str(tmp_path / "a"), str(tmp_path / "a")]) == 0


def test_masters_are_rounded_before_they_are_compared(oracle: Oracle, tmp_path: Path) -> None:
    case = oracle["llama-zero2"]
    shutil.copytree(case.base, tmp_path / "model")
    masters = case.last.masters()
    base = load_file(case.base / "model.safetensors")
    save_file(
        {name: masters[name].astype(base[name].dtype) for name in base},
        tmp_path / "model" / "model.safetensors",
        {"format": "pt"},
    )
    assert reshard.diff(case.root, tmp_path / "model").same
    assert not reshard.diff(case.root, case.base).same


@pytest.mark.parametrize("how", ["diff", "verify", "verify against"])
def test_a_file_that_changes_meanwhile_is_noticed(tmp_path: Path, how: str) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    save_file({"a": np.zeros(9, np.float32)}, model / "model.safetensors")
    reshard.convert(model, out)

    def touch(done: int, total: int) -> None:
        os.utime(out / "model.safetensors", ns=(1, 1))

    compare: dict[str, Callable[[], object]] = {
        "diff": lambda: reshard.diff(model, out, progress=touch),
        "verify": lambda: reshard.verify(out, progress=touch),
        "verify against": lambda: reshard.verify(out, model, progress=touch),
    }
    with pytest.raises(reshard.IncompleteError, match="changed while it was read"):
        compare[how]()


def both_ways(one: Path, other: Path) -> reshard.Comparison:
    """The comparison of two checkpoints, which is the same the other way round."""
    there, back = reshard.diff(one, other), reshard.diff(other, one)
    assert (there.num_equal, there.same) == (back.num_equal, back.same)
    kinds = {"first": "second", "second": "first"}

    def turned(kind: str) -> str:
        return re.sub("first|second", lambda word: kinds[word[0]], kind)

    mine = sorted((d.name, d.kind, d.differing, d.largest, d.mean) for d in there.differences)
    theirs = sorted(
        (d.name, turned(d.kind), d.differing, d.largest, d.mean) for d in back.differences
    )
    assert mine == theirs
    rounding = [turned(f.message) for f in back.findings if f.code == "rounded"]
    assert [f.message for f in there.findings if f.code == "rounded"] == rounding
    return there


@pytest.mark.parametrize("name", [*LLAMAS, "lora-zero2", "lora-tied-zero3"])
def test_the_order_of_two_checkpoints_does_not_matter(
    oracle: Oracle, name: str, tmp_path: Path
) -> None:
    """A converted folder and its checkpoint are the same, whichever is named first."""
    case, out = oracle[name], tmp_path / "out"
    lora = name.startswith("lora")
    reshard.convert(case.root, out, base=case.base, lora_alpha=6 if lora else None,
                    fill_from_base=lora)  # fmt: skip
    found = both_ways(case.root, out)
    if not lora:  # what came from the base is not in the checkpoint
        assert found.same
        assert [f.message for f in found.findings if f.code == "rounded"] == [
            f"{found.num_equal} tensors are equal once the first's float32 is rounded to bfloat16."
        ]
    assert not both_ways(out, case.base).same
    assert both_ways(out, out).same


@pytest.mark.parametrize("dtype", ["keep", "bf16", "fp16", "fp32"])
@pytest.mark.parametrize("to", ["hf", "dcp"])
def test_a_rounded_copy_is_the_same_both_ways(
    oracle: Oracle, to: To, dtype: DTypeChoice, tmp_path: Path
) -> None:
    case = oracle["llama-zero2"]
    reshard.convert(case.root, tmp_path / "narrow", base=case.base)
    for source in (case.root, tmp_path / "narrow"):
        out = tmp_path / f"{source.name}-{dtype}"
        reshard.convert(source, out, to=to, dtype=dtype)
        assert both_ways(source, out).same
        assert both_ways(out, source).same
    wide, narrow = (tmp_path / f"{name}-{dtype}" for name in (case.root.name, "narrow"))
    assert both_ways(wide, narrow).same == (dtype in ("keep", "bf16"))


def test_what_is_on_one_side_only_is_so_both_ways(tmp_path: Path) -> None:
    for name, extra in (("a", "x"), ("b", "y")):
        (tmp_path / name).mkdir()
        tensors = {"w": np.ones(3, np.float32), extra: np.ones(2, np.float32)}
        save_file(tensors, tmp_path / name / "model.safetensors")
    assert {d.kind for d in both_ways(tmp_path / "a", tmp_path / "b").differences} == {
        "only in the first", "only in the second",
    }  # fmt: skip


def test_widths_that_no_rounding_connects(tmp_path: Path) -> None:
    dtypes = {"i32": np.int32, "i64": np.int64, "f16": np.float16, "f32": np.float32}
    values = {name: np.array([1, 2], dtype) for name, dtype in dtypes.items()}
    for name, value in values.items():
        (tmp_path / name).mkdir()
        save_file({"w": value}, tmp_path / name / "model.safetensors")
    for one in values:
        for other in values:
            found = both_ways(tmp_path / one, tmp_path / other)
            assert found.same == (one == other or (one[0] == other[0] == "f"))


def test_diff_says_the_rounding(
    oracle: Oracle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case, out = oracle["llama-zero2"], tmp_path / "out"
    reshard.convert(case.root, out, base=case.base)
    assert run(command, ["diff", str(out), str(case.root)]) == 0
    assert "once the second's float32 is rounded to bfloat16" in capsys.readouterr().err
    assert run(command, ["diff", str(case.root), str(out), "--json"]) == 0
    codes = [f["code"] for f in json.loads(capsys.readouterr().out)["findings"]]
    assert "rounded" in codes
