"""Files and functions that can be read at once."""

from __future__ import annotations

import ast

import pytest

from tests.test_imports import MODULES

MOST_LINES, MOST_IN_A_FUNCTION = 400, 60
REASON = "Long because"


@pytest.mark.parametrize("module", MODULES)
def test_a_long_file_says_why(module: str) -> None:
    text = MODULES[module].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES or REASON in text


@pytest.mark.parametrize("module", MODULES)
def test_a_function_is_short(module: str) -> None:
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            # Without the signature and the docstring: `reshard.convert` has forty options.
            first = node.body[bool(ast.get_docstring(node)) and len(node.body) > 1]
            end = node.end_lineno or node.lineno
            assert end - first.lineno < MOST_IN_A_FUNCTION, node.name
