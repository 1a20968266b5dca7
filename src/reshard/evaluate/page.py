"""The report as one web page: no script, no font, no picture from anywhere else."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from reshard.evaluate.plots import WIDTH, benchmark_plots
from reshard.evaluate.report import TryReport, plain
from reshard.storage.texts import write_text


def write_page(report: TryReport, path: Path) -> None:
    """Write the page to `path`; raises `WriteError`."""
    write_text(path, render_page(report))


def render_page(report: TryReport) -> str:
    """The page as HTML. All that a model or a user wrote is escaped."""
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = _figure
    environment.filters["pretty"] = _pretty
    template = (files("reshard.evaluate") / "data" / "page.html.jinja").read_text(encoding="utf-8")
    plots = benchmark_plots(report.benchmark.batches) if report.benchmark else []
    page: str = environment.from_string(template).render(
        report=report, plots=plots, plot_width=WIDTH
    )
    return page


def _figure(value: float | None, digits: int = 4) -> str:
    """A number for people; a dash where there is none."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def _pretty(value: Any) -> str:
    return json.dumps(plain(value), ensure_ascii=False, indent=2)
