"""What is said of a file's words and values: on one line, short, without Python's warnings."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch.distributed import checkpoint as dcp

import reshard
from reshard.cli.app import reshard as command
from reshard.cli.app import run as cli
from reshard.core.findings import CODES, Finding, objects_unread
from reshard.errors import NamesError, PlanError, ReshardError
from tests import zero3

# Names that would make a row, a column or a line of their own; shown, each is one line.
FORGING = (
    "w\nmodel.fake.weight  float32  (1,)",
    "w\r\nverified  yes, read back",
    "w\u2028note: all is well",
    "w\x1b[2K\x1b[1Aerror",
    "w\x85x",
    "w" + "x" * 500,
)


def run(*arguments: str | Path) -> tuple[str, str]:
    """A command's output and what it says beside; every warning of Python is an error.

    Like `started`, without the start of a process.
    """
    shown, said = io.StringIO(), io.StringIO()
    with warnings.catch_warnings(), redirect_stdout(shown), redirect_stderr(said):
        warnings.simplefilter("error")
        cli(command, [*map(str, arguments)])
    assert "Warning" not in said.getvalue()
    return shown.getvalue(), said.getvalue()


def started(*arguments: str | Path) -> tuple[str, str]:
    """The same in a process of its own, which may warn of what it imports, too."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    line = [sys.executable, "-W", "error", "-m", "reshard", *map(str, arguments)]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=60)
    assert "Warning" not in done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


def model(folder: Path, tensors: dict[str, Any], config: dict[str, Any] | None = None) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    return folder


@pytest.mark.heavy
@pytest.mark.parametrize("name", FORGING, ids=lambda name: repr(name[:12]))
def test_a_name_is_one_line_wherever_it_is_printed(tmp_path: Path, name: str) -> None:
    ones = np.ones((2, 2), np.float32)
    one = model(tmp_path / "one", {name: ones, "b": ones})
    other = model(tmp_path / "other", {name: ones * 2, "c": ones})
    plain = model(tmp_path / "x", {"plain": ones, "b": ones})
    lines = {}
    for spelt, tensors in ((name, one), ("plain", plain)):
        shown, said = run("inspect", tensors, "--tensors")
        lines[spelt] = (shown.count("\n"), said.count("\n"))
        assert all(len(line) < 1000 for line in shown.split("\n"))
    assert lines[name] == lines["plain"]
    assert json.loads(run("inspect", one, "--tensors", "--json")[0])["tensors"][-1]["name"] == name
    for arguments in (
        ("diff", one, other),
        ("convert", one, tmp_path / "out", "--base", other),
        ("inspect", one, "--base", other),
        ("doctor", one, "--base", other),
    ):
        shown, said = run(*arguments)
        for line in (*shown.split("\n"), *said.split("\n")):
            assert line.isprintable()
            assert not line.startswith(("model.fake", "verified  yes", "note: all"))
            assert len(line) < 5000


def test_the_lines_of_a_misfit_are_ours(tmp_path: Path) -> None:
    ones = np.ones((2, 2), np.float32)
    source = model(tmp_path / "one", {"a\n  b": ones})
    base = model(tmp_path / "base", {"c\n  d": ones})
    with pytest.raises(NamesError) as caught:
        reshard.convert(source, tmp_path / "out", base=base)
    lines = str(caught.value).split("\n")
    assert "  a\\n  b (nearest: c\\n  d)" in lines
    assert not any(line.strip() in ("b", "d") for line in lines)
    assert lines[-1] == caught.value.hint
    assert caught.value.missing == ("c\n  d",)


def test_an_error_of_one_line_stays_one() -> None:
    error = ReshardError("it has a\nb.", path="x\ny", tensor="t\nu", hint="Do\nthat.")
    assert "\n" not in str(error)


def test_notes_are_cut() -> None:
    for finding in (
        Finding("no-base", "x" * 100_000),
        objects_unread([f"a.{number}" for number in range(100_000)]),
        objects_unread(["a" * 100_000]),
    ):
        assert len(finding.message) < 2100
        assert len(finding.to_json()["message"]) < 2100
    assert objects_unread(["a", "b"]).message == "objects that were skipped: a, b."


def test_a_pickle_of_a_thousand_classes_is_a_short_note(tmp_path: Path) -> None:
    """Found in a real file: each class that is named is one more of a note."""
    from tests.torchfile.handmade import tensor, text, torch_file

    classes = b"".join(b"cuser.module\nClass%d\n)\x81" % number for number in range(1000))
    body = b"}(" + text("w") + tensor() + text("x") + b"(" + classes + b"tu"
    (tmp_path / "pytorch_model.bin").write_bytes(torch_file(body))
    (finding,) = reshard.open(tmp_path).catalog.findings
    assert finding.code == "objects-unread"
    assert len(finding.message) < 500
    assert finding.message.endswith("and 992 more.")


@pytest.mark.heavy
@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes are Linux's")
def test_names_that_are_not_text(tmp_path: Path) -> None:
    """A tag's and an option's are spelt out; a file's is refused, since all files are listed."""
    ones = np.ones((2, 2), np.float32)
    base = model(tmp_path / "base", {"w": ones})
    odd = Path(os.fsdecode(os.fsencode(base) + b"/a\xff.txt"))
    odd.write_text("x")
    source = model(tmp_path / "one", {"w": ones * 2})
    shown, said = started("convert", source, tmp_path / "out", "--base", base)
    assert "a\\udcff.txt: the file's name is not UTF-8" in said
    assert not (tmp_path / "out").exists()
    odd.rename(base / "a.txt")
    shown, said = started("convert", source, tmp_path / "out", "--base", base)
    assert "verified" in shown
    tagged = Path(os.fsdecode(os.fsencode(tmp_path) + b"/run/step\xff"))
    tagged.mkdir(parents=True)
    zero3.save(tagged, {"w": torch.ones(2, 2)}, world=1)
    out = tmp_path / "tagged"
    assert "verified" in started("convert", tagged, out)[0]
    assert json.loads((out / "reshard.json").read_text())["source"]["tag"] == "step\\udcff"
    assert "all as written" in started("verify", out)[0]


# Values.


def bits(values: Sequence[int], dtype: Any) -> np.ndarray[Any, Any]:
    width = np.dtype(dtype).itemsize
    return np.array(values, f"u{width}").view(dtype)


# Quiet and signalling NaNs with every kind of payload, of both signs, and infinities.
PATTERNS = {
    "float32": bits([0x7F800001, 0xFF800001, 0x7FC00000, 0xFFFFFFFF, 0x7FBFFFFF, 0x7F800000], "f4"),
    "float16": bits([0x7C01, 0xFC01, 0x7E00, 0xFFFF, 0x7DFF, 0x7C00], "f2"),
    "bfloat16": bits([0x7F81, 0xFF81, 0x7FC0, 0xFFFF, 0x7FBF, 0x7F80], ml_dtypes.bfloat16),
}


@pytest.mark.heavy
@pytest.mark.parametrize("stored", PATTERNS)
def test_no_pattern_of_a_nan_makes_python_warn(tmp_path: Path, stored: str) -> None:
    values = PATTERNS[stored]
    integers = torch.from_numpy(values.view(f"i{values.dtype.itemsize}"))
    tensors = {"w": integers.view(getattr(torch, stored)), "v": torch.zeros(3)}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    path = tmp_path / "pytorch_model.bin"
    first = started if stored == "float32" else run
    first("inspect", path)
    outs = []
    for dtype in ("keep", "float32", "float16", "bfloat16"):
        out = tmp_path / dtype
        shown, said = first("convert", path, out, "--dtype", dtype)
        assert "verified" in shown, said
        assert "w (5 NaN, 1 infinite)" in said
        outs.append(out)
    for out in outs:
        each = first if out is outs[1] else run
        each("diff", outs[0], out)
        each("doctor", out)
        each("verify", out, "--against", path)


def zero_save(folder: Path, values: torch.Tensor) -> Path:
    folder.mkdir()
    zero3.save(folder, {"w": values, "v": torch.ones(8)}, world=2)
    return folder


def dcp_save(folder: Path, values: torch.Tensor) -> Path:
    dcp.save({"w": values, "v": torch.ones(8)}, checkpoint_id=folder, no_dist=True)
    return folder


def bin_save(folder: Path, values: torch.Tensor) -> Path:
    folder.mkdir()
    torch.save({"w": values, "v": torch.ones(8)}, folder / "pytorch_model.bin")
    return folder


def safetensors_save(folder: Path, values: torch.Tensor) -> Path:
    return model(folder, {"w": values.numpy(), "v": np.ones(8, np.float32)})


SAVES = [zero_save, dcp_save, bin_save, safetensors_save]


@pytest.mark.heavy
@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("dtype", ["keep", "bfloat16"])
def test_values_that_are_not_finite_are_a_finding(tmp_path: Path, save: Any, dtype: Any) -> None:
    values = torch.ones(3 << 20)  # several blocks
    values[7], values[-1], values[2 << 20] = float("nan"), float("inf"), float("-inf")
    source = save(tmp_path / "in", values)
    base = safetensors_save(tmp_path / "base", torch.zeros(3 << 20))
    report = reshard.convert(source, tmp_path / "out", base=base, dtype=dtype)
    (found,) = [f for f in report.findings if f.code == "not-finite"]
    assert found.message == (
        "1 of 2 tensors hold values that are not finite: w (1 NaN, 2 infinite)."
    )
    assert found.severity == CODES["not-finite"].severity == "warning"
    for strict in (True, ["not-finite"]):
        with pytest.raises(PlanError, match="not-finite: 1 of 2 tensors hold"):
            reshard.convert(source, tmp_path / "strict", base=base, dtype=dtype, strict=strict)
        assert not (tmp_path / "strict").exists()
        assert not list(tmp_path.glob(".strict*"))


@pytest.mark.parametrize("save", SAVES)
def test_values_that_are_finite_are_none(tmp_path: Path, save: Any) -> None:
    values = torch.tensor([torch.finfo(torch.float32).max, -torch.finfo(torch.float32).max, 0.0])
    base = safetensors_save(tmp_path / "base", torch.zeros(3))
    report = reshard.convert(
        save(tmp_path / "in", values), tmp_path / "out", base=base, strict=True
    )
    assert not [f for f in report.findings if f.code == "not-finite"]


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_values_of_eight_bits(tmp_path: Path, dtype: str) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(getattr(torch, dtype))
    torch.save({"w": every}, tmp_path / "pytorch_model.bin")
    report = reshard.convert(tmp_path / "pytorch_model.bin", tmp_path / "out")
    wide = every.float()
    nan, infinite = int(wide.isnan().sum()), int(wide.isinf().sum())
    assert f"w ({nan} NaN, {infinite} infinite)" in report.warnings[-1] + report.warnings[0]


# Checksums.


@pytest.mark.heavy
def test_a_report_says_what_could_be_checked(tmp_path: Path) -> None:
    values = torch.ones(64)
    expected = {
        zero_save: "2 of 2 source checksums compared",
        dcp_save: "2 of 2 source checksums compared",
        bin_save: "2 of 2 source checksums compared",
        safetensors_save: "0 of 2 source checksums: this format has none",
    }
    for save, words in expected.items():
        source = save(tmp_path / save.__name__, values)
        shown, said = run("convert", source, tmp_path / f"{save.__name__}-out")
        assert words in shown, said
        assert "no checksum" not in said


def without_crc(path: Path, count: int | None = None) -> None:
    """Set CRC-32s of a zip's directory and headers to 0: «not computed»."""
    content = bytearray(path.read_bytes())
    at, done = 0, 0
    while (at := content.find(b"PK\1\2", at)) >= 0:
        name = content[at + 46 : at + 46 + int.from_bytes(content[at + 28 : at + 30], "little")]
        if b"/data/" in name and (count is None or done < count):
            content[at + 16 : at + 20] = bytes(4)
            done += 1
        at += 4
    path.write_bytes(content)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("save", "files", "count"),
    [
        (zero_save, "bf16_zero_pp_rank_0_*", 1),  # the rank's flat tensor, which holds both
        (dcp_save, "*.distcp", 1),
        (bin_save, "*.bin", 1),
    ],
)
def test_files_without_crc_are_a_finding(tmp_path: Path, save: Any, files: str, count: int) -> None:
    source = save(tmp_path / "in", torch.ones(64))
    for path in source.glob(files):
        without_crc(path, 1)
    report = reshard.convert(source, tmp_path / "out")
    assert report.records_unchecked == count
    assert report.records_checked == 1
    assert [f.code for f in report.findings if f.severity == "warning"][:1] == ["no-checksums"]
    with pytest.raises(PlanError, match="no-checksums"):
        reshard.convert(source, tmp_path / "strict", strict=["no-checksums"])
    shown, _ = run("convert", source, tmp_path / "shown")
    assert f"1 of {1 + count} source checksums: the others have none" in shown


def test_an_old_container_has_none(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"w": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    shown, said = run("convert", path, tmp_path / "out")
    assert "0 of 1 source checksums: this format has none" in shown
    assert said.count("no checksums") == 1
