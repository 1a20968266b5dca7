"""The report's schema: shipped, true to the types, kept by real reports, and documented."""

from __future__ import annotations

import json
import math
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from reshard.core.findings import CODES, Finding
from reshard.errors import WriteError
from reshard.evaluate.report import Failure, Model, Score, TryReport
from reshard.evaluate.schema import report_schema, tables
from reshard.evaluate.verdict import THRESHOLDS
from tests.evaluate import tiny
from tests.evaluate.conftest import Models
from tests.evaluate.trying import attempt

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "try.md").read_text(encoding="utf-8")


def shipped() -> dict[str, Any]:
    path = files("reshard.evaluate") / "data" / "report.schema.json"
    schema: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return schema


def validate(report: dict[str, Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    jsonschema.Draft202012Validator.check_schema(shipped())
    jsonschema.Draft202012Validator(shipped()).validate(report)


def test_the_shipped_schema_is_that_of_the_types() -> None:
    assert shipped() == report_schema()


def test_the_tables_of_the_page_are_those_of_the_types() -> None:
    assert tables().strip() in DOCS


def test_a_full_report_keeps_the_schema(models: Models, tmp_path: Path) -> None:
    attempt(
        models("llava"),
        tmp_path,
        images=(tiny.image(tmp_path / "picture.png"),),
        benchmark=True,
        benchmark_samples=2,
        compare=models("llava"),
        html=tmp_path / "page.html",
    )
    validate(json.loads((tmp_path / "report.json").read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", ["classifier", "srm_vl"])
def test_a_report_of_scores_keeps_the_schema(models: Models, tmp_path: Path, name: str) -> None:
    attempt(models(name), tmp_path, compare=models(name), benchmark=True, benchmark_samples=1)
    validate(json.loads((tmp_path / "report.json").read_text(encoding="utf-8")))


def test_a_report_of_a_failure_keeps_the_schema(tmp_path: Path) -> None:
    attempt(tmp_path / "nowhere", tmp_path)
    validate(json.loads((tmp_path / "report.json").read_text(encoding="utf-8")))


def test_the_schema_refuses_what_is_not_a_report() -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    for wrong in (
        {},
        {**TryReport().to_json(), "more": 1},
        {**TryReport().to_json(), "status": "well"},
    ):
        with pytest.raises(jsonschema.ValidationError):
            validate(wrong)


def test_numbers_that_json_cannot_spell_become_null(tmp_path: Path) -> None:
    report = TryReport(scores=[Score("p", "p", {"a": math.nan, "b": math.inf, "c": 1.0}, 1, 0.1)])
    path = tmp_path / "report.json"
    report.write(path)
    assert json.loads(path.read_text())["scores"][0]["scores"] == {"a": None, "b": None, "c": 1.0}
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.json"]


def test_a_report_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match="cannot be written"):
        TryReport().write(tmp_path / "no" / "report.json")


MODEL = Model("k", "a", None, 1, {"float32": 1}, ("cpu",), True, 0.1)


@pytest.mark.parametrize(
    ("report", "status"),
    [
        (TryReport(model=MODEL), "passed"),
        (TryReport(), "failed"),
        (TryReport(model=MODEL, failures=[Failure("s", "e", "m", None)]), "failed"),
        (TryReport(model=MODEL, findings=[Finding("weights-constant", "m")]), "failed"),
        (TryReport(model=MODEL, findings=[Finding("generation-loops", "m")]), "passed"),
    ],
)
def test_the_status_and_the_exit_code(report: TryReport, status: str) -> None:
    report.close()
    assert report.status == status
    assert report.exit_code == (0 if status == "passed" else 1)


def test_every_field_is_documented() -> None:
    definitions = {"Report": shipped(), **shipped()["$defs"]}
    for name, schema in definitions.items():
        section = re.search(rf"^### {name}$(.*?)(?=^##|\Z)", DOCS, re.MULTILINE | re.DOTALL)
        assert section is not None, name
        for field, content in schema["properties"].items():
            assert f"| `{field}` | {content['description']} |" in section[1], (name, field)


def test_every_finding_is_documented_with_its_severity() -> None:
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| (error|warning|info) \|", DOCS, re.MULTILINE)
    assert dict(rows) == {name: c.severity for name, c in CODES.items() if "try" in c.by}
    assert len(rows) == len(dict(rows))


def test_the_thresholds_are_documented() -> None:
    for value in (THRESHOLDS.mean_kl, THRESHOLDS.relative_difference, THRESHOLDS.score_difference):
        assert f"{value:g}" in DOCS
