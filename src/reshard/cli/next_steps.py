"""Next steps with the folder that a conversion wrote."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from reshard.errors import ReshardError
from reshard.storage import strict_json
from reshard.storage.local import snapshot
from reshard.storage.paths import absolute, exists, is_file

if TYPE_CHECKING:
    from reshard.conversion.report import Report


def next_commands(report: Report, base: Path | None) -> list[tuple[str, str]]:
    """What a user can do with the output, in words, and the command for it.

    Only for a folder that is a model which writes text; vLLM is named for causal language models
    and for those with a vision tower alone. The conversion succeeded, whatever fails here.
    """
    try:
        return _next_commands(report, base)
    except ReshardError:
        return []


def _next_commands(report: Report, base: Path | None) -> list[tuple[str, str]]:
    folder = Path(report.target)
    if report.dry_run or not is_file(folder / "config.json"):
        return []
    config = strict_json.read_file(folder / "config.json")
    stated = config.get("architectures")
    names = [str(name) for name in stated] if isinstance(stated, list) else []
    causal = any(name.endswith("ForCausalLM") for name in names)
    sees = any(name.endswith("ForConditionalGeneration") for name in names) and (
        "vision_config" in config
    )
    if not (causal or sees):
        return []
    out = shlex.quote(report.target)
    compare = "" if base is None else f" --compare {shlex.quote(str(snapshot(base)))}"
    return [
        ("try it", f"reshard try {out}{compare}"),
        ("serve it", f"vllm serve {out}"),
    ]


def at_least(path: str) -> Path:
    """The nearest folder above a path, or the path, that exists."""
    place = absolute(Path(path))
    while not exists(place):
        place = place.parent
    return place


def conversion_of(
    source: Path, base: Path | None, tag: str | None, prefix: str | None, role: str | None
) -> str:
    """The command that converts what was inspected; OUT, and MODEL without a base, are to be
    filled in."""
    command = f"reshard convert {shlex.quote(str(source))} OUT"
    command += f" --base {'MODEL' if base is None else shlex.quote(str(base))}"
    for flag, value in (("tag", tag), ("prefix", prefix), ("role", role)):
        command += "" if value is None else f" --{flag} {shlex.quote(value)}"
    return command
