"""`reshard.json`: the text that `json.dumps` would make, at a tenth of its cost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reshard import manifest
from reshard.catalog import Origin
from reshard.manifest import Stated

TENSORS = {
    "a": Stated("float32", (2, 3), "ab"),
    'é"\\\n': Stated("bfloat16", (), "cd"),
    "z": Stated("int8", (0,), "ef"),
}


@pytest.mark.parametrize("tensors", [TENSORS, {}], ids=["tensors", "none"])
@pytest.mark.parametrize("beside", [{"f/x": TENSORS, "g": {}}, {}], ids=["beside", "alone"])
def test_the_text_is_that_of_json(
    tensors: dict[str, Stated], beside: dict[str, dict[str, Stated]]
) -> None:
    options = {"a": [1, {"b": []}], "c": None, "d": "x\ny"}
    text = manifest.render("dcp", Origin(Path("x"), "torch"), options, {}, tensors, beside)
    value = json.loads(text)
    assert text == (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
    assert list(value["tensors"]) == list(tensors)
    assert list(value.get("beside", {})) == list(beside)
