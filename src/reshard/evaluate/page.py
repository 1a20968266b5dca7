from pathlib import Path

from reshard.evaluate.report import Report


def write_page(report: Report, path: Path) -> None: ...
