"""The paths of a run's report and page: no other file is ever overwritten."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain, count
from pathlib import Path
from typing import Any

from reshard.errors import ReshardError, WriteError, brief
from reshard.storage import strict_json
from reshard.storage.paths import is_file, real

#: In the head of every page that `reshard try` writes, which identifies the page.
PAGE_MARK = '<meta name="generator" content="reshard try">'
# Bytes of the largest report that is read.
_MAX_REPORT = 64 << 20
_MARKS = {"schema_version", "status", "model_path", "failures"}


def earlier_report(path: Path) -> Mapping[str, Any] | None:
    """The report of an earlier run at `path`; None where nothing is there, or a device or a pipe.

    Raises `WriteError` where a file is there that is not a report.
    """
    found = _report(path)
    if found is None and is_file(path):
        raise WriteError(
            "this file is not a report of an earlier run, and is not replaced; nothing was run.",
            path=path,
            hint="Name another file with --output-file.",
        )
    return found


def _report(path: Path) -> Mapping[str, Any] | None:
    try:
        found = strict_json.read_file(path, max_nbytes=_MAX_REPORT) if is_file(path) else {}
    except ReshardError:
        return None
    return found if found.keys() >= _MARKS else None


def free(path: Path, model: Path) -> Path:
    """`path`, or the first of `NAME-2`, `NAME-3`, ... that holds nothing, or a report of `model`.

    So a run of one model leaves the report of another alone.
    """
    places = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in count(2))
    return next(place for place in chain([path], places) if _is_free(place, model))


def _is_free(path: Path, model: Path) -> bool:
    report = _report(path)
    if report is None:
        return not is_file(path)
    return real(Path(str(report["model_path"]))) == real(model)


def replacing(path: Path) -> str:
    """The message about a report that will be replaced; empty if there is none."""
    earlier = earlier_report(path)
    if earlier is None:
        return ""
    run = f"{brief(earlier['model_path'])}, {brief(earlier.get('started'))}"
    return f"{path} held the report of an earlier run ({run}), which this one replaces."
