"""Every hint in the sources: what errors, findings and doctor's findings advise, as templates.

A template is the text with `{}` where a value goes in. Names are followed to what they are
assigned in their function or module, calls to what the function returns, in the sources alone.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

SOURCES = Path(__file__).parents[2] / "src" / "reshard"
_KEYWORDS = ("hint", "advice", "fix")
# What hands on a hint that was made elsewhere, and is found there.
_HANDED_ON = (
    "error.hint",
    "finding.fix",
    "signs.advice",
    "signs.repair.words",
    "kind.hint",
    "refused[0].fix",
    "CODES[refused[0].code].fix",
)
_PARAMETERS = ("hint", "fix", "near", "elsewhere")
_DEPTH = 4

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Module:
    """One source file, and what its names stand for."""

    def __init__(self, path: Path) -> None:
        self.name = path.relative_to(SOURCES).with_suffix("").as_posix()
        self.tree = ast.parse(path.read_text("utf-8"))
        self.functions = {n.name: n for n in ast.walk(self.tree) if isinstance(n, Function)}

    def templates(self, node: ast.expr, within: ast.AST, depth: int = 0) -> Iterator[str]:
        """What an expression's text may be."""
        if isinstance(node, ast.Constant):
            if isinstance(node.value, str):
                yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield from self._joined(node, within, depth)
        elif isinstance(node, ast.IfExp):
            for branch in (node.body, node.orelse):
                yield from self.templates(branch, within, depth)
        elif isinstance(node, ast.BoolOp):
            for value in node.values:
                yield from self.templates(value, within, depth)
        elif isinstance(node, ast.BinOp):
            for left in list(self.templates(node.left, within, depth)) or ["{}"]:
                for right in list(self.templates(node.right, within, depth)) or ["{}"]:
                    yield left + right
        elif ast.unparse(node) not in _HANDED_ON:
            yield from self._followed(node, within, depth)

    def _joined(self, node: ast.JoinedStr, within: ast.AST, depth: int) -> Iterator[str]:
        """An f-string, with the texts of those names in it that stand for one."""
        found = [""]
        for part in node.values:
            texts = ["{}"]
            if isinstance(part, ast.Constant):
                texts = [str(part.value)]
            elif isinstance(part, ast.FormattedValue) and isinstance(part.value, ast.Name):
                texts = list(self.templates(part.value, within, depth + 1)) or texts
            found = [before + text for before in found for text in texts]
        yield from found

    def _followed(self, node: ast.expr, within: ast.AST, depth: int) -> Iterator[str]:
        found: list[str] = []
        if depth < _DEPTH and isinstance(node, ast.Name):
            for place in (within, self.tree):
                for value in _assigned(place, node.id):
                    found += self.templates(value, within, depth + 1)
                if found:
                    break
            own = found or node.id.startswith("__")
            owner = None if own else self._imported_from(node.id)
            if owner is not None:
                found += owner.templates(node, owner.tree, depth + 1)
        elif depth < _DEPTH and isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            name = node.func.id if isinstance(node.func, ast.Name) else name
            module, function = _function(self, name)
            for returned in ast.walk(function) if function else ():
                if isinstance(returned, ast.Return) and returned.value is not None:
                    found += module.templates(returned.value, function or within, depth + 1)
        if not found and ast.unparse(node) in _PARAMETERS:
            return
        yield from found or ["{}"]

    def _imported_from(self, name: str) -> Module | None:
        """The module of these that a constant is imported from; None where it is not."""
        for node in self.tree.body:
            if isinstance(node, ast.ImportFrom) and name in (alias.name for alias in node.names):
                path = (node.module or "").removeprefix("reshard.").replace(".", "/")
                return next((module for module in _MODULES if module.name == path), None)
        return None

    def hints(self) -> Iterator[str]:
        """The templates of every hint that the module states."""
        owners = {
            child: function
            for function in ast.walk(self.tree)
            if isinstance(function, Function)
            for child in ast.walk(function)
        }
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call):
                for keyword in node.keywords:
                    if keyword.arg in _KEYWORDS:
                        yield from self.templates(keyword.value, owners.get(node, self.tree))
                yield from self._records(node, owners.get(node, self.tree))
        yield from self.kinds()

    def _records(self, node: ast.Call, within: ast.AST) -> Iterator[str]:
        """Hints of records that are written by position: the codes' own, and `_Kind`."""
        called = ast.unparse(node.func)
        if called == "Finding" and len(node.args) > 3:
            yield from self.templates(node.args[3], within)
        if called in ("Code", "_Kind") and len(node.args) > 2:
            yield from self.templates(node.args[2], self.tree)

    def kinds(self) -> Iterator[str]:
        """Hints in a table of tuples: (.., what, hint)."""
        for value in _assigned(self.tree, "_KINDS"):
            for row in getattr(value, "elts", ()):
                if isinstance(row, ast.Tuple) and len(row.elts) == 3:
                    yield from self.templates(row.elts[2], self.tree)


def _assigned(place: ast.AST, name: str) -> Iterator[ast.expr]:
    body = ast.walk(place) if isinstance(place, Function) else getattr(place, "body", ())
    for node in body:
        if isinstance(node, ast.Assign):
            if any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
                yield node.value
        elif (
            isinstance(node, (ast.AnnAssign, ast.AugAssign))
            and node.value is not None
            and isinstance(node.target, ast.Name)
            and node.target.id == name
        ):
            yield node.value


_MODULES = [Module(path) for path in sorted(SOURCES.rglob("*.py"))]


def _function(near: Module, name: str) -> tuple[Module, Function | None]:
    """A function by its name, in the module or in the only other one that has it."""
    if name in near.functions:
        return near, near.functions[name]
    having = [module for module in _MODULES if name in module.functions]
    if len(having) == 1:
        return having[0], having[0].functions[name]
    return near, None


def hints() -> dict[str, set[str]]:
    """Every template, and the modules that state it. A hint that is only `{}` is its module's."""
    found: dict[str, set[str]] = {}
    for module in _MODULES:
        for template in filter(None, module.hints()):
            found.setdefault(template, set()).add(module.name)
    return found
