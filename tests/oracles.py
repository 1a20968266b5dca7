"""The packages that tests compare with, and what is skipped where one is not installed."""

from __future__ import annotations

import ast
from functools import cache
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: Each may be absent: whatever imports it is skipped, and small checkpoints that lie in
#: `tests/golden` stand in.
ORACLES = (
    "PIL",
    "accelerate",
    "deepspeed",
    "megatron",
    "peft",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
    "zstandard",
)
MISSING = frozenset(name for name in ORACLES if find_spec(name) is None)


@cache
def lacking(path: Path) -> str | None:
    """A missing package that a file imports when it is imported itself, or that another file of
    this repository imports for it; None where all of them are installed."""
    return _lacking(path, frozenset())


def _lacking(path: Path, above: frozenset[Path]) -> str | None:
    for name in _imported(path):
        if name.partition(".")[0] in MISSING:
            return name.partition(".")[0]
        for inner in _files(name):
            if inner not in above and inner != path:
                found = _lacking(inner, above | {path})
                if found is not None:
                    return found
    return None


@cache
def _imported(path: Path) -> tuple[str, ...]:
    """What the statements outside functions import or ask for with `pytest.importorskip`, each name
    with its module's."""
    names: dict[str, None] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Expr | ast.Assign):
            match node.value:
                case ast.Call(ast.Attribute(attr="importorskip"), [ast.Constant(str(package))]):
                    names[package] = None
        if isinstance(node, ast.Import):
            names.update(dict.fromkeys(alias.name for alias in node.names))
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names[node.module] = None
            names.update(dict.fromkeys(f"{node.module}.{alias.name}" for alias in node.names))
    return tuple(names)


def _files(name: str) -> list[Path]:
    """The files beside the library that an import of a module runs."""
    first, *rest = name.split(".")
    if first not in ("tests", "demo", "benchmarks", "fuzz"):
        return []
    folder = ROOT / first
    found = [folder / "__init__.py"]
    for part in rest:
        found += [folder / f"{part}.py", folder / part / "__init__.py"]
        folder /= part
    return [path for path in found if path.is_file()]
