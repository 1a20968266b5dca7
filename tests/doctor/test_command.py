"""The command, its exit codes and its page; an environment without torch."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import reshard
from reshard.cli.app import reshard as command
from reshard.cli.app import run
from reshard.core.findings import CODES, Code
from reshard.diagnosis import diagnosis as module
from reshard.diagnosis.case import Case
from reshard.diagnosis.checks.engines import CHECKS as ENGINE_CHECKS
from reshard.diagnosis.signs import Signs
from reshard.diagnosis.table import CHECKS
from reshard.diagnosis.training import CODES as TRAINING
from reshard.errors import VerificationError
from tests.doctor import models
from tests.doctor.conftest import Pairs
from tests.folders import edit_config

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "doctor.md").read_text("utf-8")


def prefixed(pairs: Pairs, folder: Path) -> Path:
    """A folder whose names begin with `module.` and that has no tokenizer."""
    ill = pairs("llama").copy(folder)
    models.save(ill, {f"module.{key}": value for key, value in models.load(ill).items()})
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (ill / file).unlink()
    return ill


def test_a_healthy_folder(pairs: Pairs, capsys: pytest.CaptureFixture[str]) -> None:
    pair = pairs("llama")
    assert run(command, ["doctor", str(pair.healthy), "--base", str(pair.base)]) == 0
    assert capsys.readouterr().out.endswith("21 tensors, 40.3 kB: nothing is wrong with it.\n")
    assert run(command, ["doctor", str(pair.healthy)]) == 0
    assert "--base compares it" in capsys.readouterr().out


def test_findings_are_shown_and_mended(
    pairs: Pairs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ill, base, out = prefixed(pairs, tmp_path / "ill"), str(pairs("llama").base), tmp_path / "out"
    assert run(command, ["doctor", str(ill), "--base", base]) == 1
    shown = capsys.readouterr()
    assert "wrapper-prefix: the names have" in shown.out
    assert "; for instance module.lm_head.weight" in shown.out
    assert "2 error(s), 0 warning(s)" in shown.out
    assert f"To repair it: reshard doctor {ill} --base {base} --repair OUT" in shown.err
    assert run(command, ["doctor", str(ill), "--base", base, "--repair", str(out)]) == 0
    assert f"Repaired in {out}" in capsys.readouterr().out
    assert run(command, ["doctor", str(out), "--base", base]) == 0
    models.assert_same_weights(out, pairs("llama").healthy)


def test_what_cannot_be_mended(
    pairs: Pairs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ill, out = prefixed(pairs, tmp_path / "ill"), tmp_path / "out"
    assert run(command, ["doctor", str(ill), "--repair", str(out)]) == 1
    shown = capsys.readouterr()
    assert "Nothing was written: tokenizer-missing cannot be repaired" in shown.err
    assert list(tmp_path.iterdir()) == [ill]


def test_a_warning_alone_is_no_failure(
    pairs: Pairs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ill = pairs("llama").copy(tmp_path / "ill")
    edit_config(ill, dtype="float16")
    assert run(command, ["doctor", str(ill)]) == 0
    assert "0 error(s), 1 warning(s)" in capsys.readouterr().out


def test_json_is_one_object(
    pairs: Pairs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ill, base, out = prefixed(pairs, tmp_path / "ill"), str(pairs("llama").base), tmp_path / "out"
    arguments = ["doctor", str(ill), "--base", base, "--repair", str(out), "--json"]
    assert run(command, arguments) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    found = json.loads(shown.out)
    nbytes = sum(tensor.nbytes for tensor in models.load(ill).values())
    assert found.pop("findings")[0] == {
        "code": "wrapper-prefix",
        "severity": "error",
        "subject": "",
        "message": "names contain parts of wrappers: module; for instance module.lm_head.weight",
        "fix": "the tensors are written under the base's names",
        "evidence": {},
    }
    assert found == {
        "folder": str(ill),
        "base": base,
        "num_tensors": 21,
        "total_bytes": nbytes,
        "repairable": ["wrapper-prefix", "tokenizer-missing"],
        "repaired": str(out),
        "remaining": [],
        "requests": None,
    }
    manifest = json.loads((out / "reshard.json").read_text())
    assert manifest["options"]["repaired"] == ["wrapper-prefix", "tokenizer-missing"]
    assert str(tmp_path) not in json.dumps(manifest)


def test_no_model_and_an_output_that_exists(
    pairs: Pairs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command, ["doctor", str(tmp_path / "nowhere")]) == 1
    assert "there is no such file or folder" in capsys.readouterr().err
    healthy = str(pairs("llama").healthy)
    assert run(command, ["doctor", healthy, "--repair", str(pairs("llama").base)]) == 1
    assert "exists" in capsys.readouterr().err


def test_strict_makes_errors_of_warnings(pairs: Pairs, tmp_path: Path) -> None:
    """Of all of them, or of those with the codes that follow."""
    ill = pairs("llama").copy(tmp_path / "ill")
    (ill / "generation_config.json").unlink()
    base = str(pairs("llama").base)
    asked = ["doctor", str(ill), "--base", base]
    (finding,) = reshard.doctor(ill, base=base).findings
    assert (finding.code, finding.severity) == ("generation-config-missing", "warning")
    assert run(command, asked) == 0
    assert run(command, [*asked, "--strict"]) == 1
    assert run(command, [*asked, "--strict", finding.code]) == 1
    assert run(command, [*asked, "--strict", "tokenizer-missing"]) == 0
    assert run(command, [*asked, "--strict", "--repair", str(tmp_path / "out")]) == 0
    found = reshard.doctor(ill, base=base, strict=[finding.code])
    assert found.errors == (finding,)
    with pytest.raises(reshard.OptionError, match="strict: 'no-base' is not the code"):
        reshard.doctor(ill, strict=["no-base"])


def test_the_repaired_folder_must_be_well(
    pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repair that leaves an error behind is not shown as one."""
    ill = pairs("llama").copy(tmp_path / "ill")
    edit_config(ill, dtype="float16")

    def only_without_float16(case: Case) -> Signs | None:
        corrected = case.folder.settings["dtype"] != "float16"
        return Signs(("it lacks float16",)) if corrected else None

    monkeypatch.setitem(CODES, "stubborn", Code("error", "always there"))
    monkeypatch.setattr(module, "CHECKS", {**CHECKS, "stubborn": only_without_float16})
    with pytest.raises(VerificationError, match="still has stubborn: it lacks float16"):
        reshard.doctor(ill, repair=tmp_path / "out")
    assert list(tmp_path.iterdir()) == [ill]


ALL = (*CHECKS, *ENGINE_CHECKS, "engine-adapter",
       *(code for code in TRAINING if code not in CHECKS))  # fmt: skip


def test_every_check_is_on_the_page() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| (\w+) \| .+ \| .+ \|$", PAGE, re.MULTILINE)
    assert rows == [(code, CODES[code].severity) for code in ALL]


def test_every_code_of_doctor_is_checked() -> None:
    assert set(ALL) == {name for name, code in CODES.items() if "doctor" in code.by}


def test_every_code_is_made_and_found_in_a_test() -> None:
    rooms = ("doctor", "quantised")
    files = [path for room in rooms for path in (ROOT / "tests" / room).glob("test_*.py")]
    tests = "".join(path.read_text("utf-8") for path in files)
    for code in ALL:
        assert re.search(rf'(repaired|refused|names)\([^)]*"{code}"', tests) or re.search(
            rf'(== [\[{{]?|findings\[)"{code}"', tests
        ), code


def test_without_torch_and_transformers(pairs: Pairs, tmp_path: Path) -> None:
    ill, base = prefixed(pairs, tmp_path / "ill"), pairs("llama").base
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'safetensors', 'deepspeed'):\n"
        "    sys.modules[name] = None\n"
        "from reshard.cli.app import main\n"
        "main()\n"
    )
    arguments = ["doctor", str(ill), "--base", str(base), "--repair", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("reshard: ")
    assert done.stderr.count("\n") == 1
    models.assert_same_weights(tmp_path / "out", pairs("llama").healthy)
