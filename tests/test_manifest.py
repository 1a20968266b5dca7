"""`reshard.json`: the text that `json.dumps` would make, and what is read from it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import reshard
from reshard.conversion import manifest
from reshard.conversion.manifest import Stated, WrittenFile
from reshard.core.catalog import Origin
from reshard.core.dtypes import FLOAT32
from reshard.core.locations import MANIFEST
from reshard.core.tensors import TensorSpec
from reshard.errors import FormatError, PlanError, VerificationError
from reshard.storage import strict_json
from reshard.storage.local import Sources

TENSORS = {
    "a": Stated("float32", (2, 3), "ab"),
    'é"\\\n': Stated("bfloat16", (), "cd"),
    "z": Stated("int8", (0,), "ef"),
}


@pytest.mark.parametrize("tensors", [TENSORS, {}], ids=["tensors", "none"])
@pytest.mark.parametrize("beside", [{"f/x": TENSORS, "g": {}}, {}], ids=["beside", "alone"])
def test_the_text_is_that_of_json(
    tensors: dict[str, Stated], beside: dict[str, dict[str, Stated]], tmp_path: Path
) -> None:
    options = {"a": [1, {"b": []}], "c": None, "d": "x\ny"}
    files = {"x": WrittenFile(3), "y": WrittenFile(4, "ab")}
    text = manifest.render("dcp", Origin(Path("x"), "torch"), options, {}, tensors, beside, files)
    value = json.loads(text)
    assert text == (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
    assert list(value["tensors"]) == list(tensors)
    assert list(value.get("beside", {})) == list(beside)
    (tmp_path / MANIFEST).write_bytes(text)
    if not tensors and not beside:
        with Sources() as sources, pytest.raises(FormatError, match="lists no tensor"):
            manifest.read(tmp_path, sources)
        return
    with Sources() as sources:
        read = manifest.read(tmp_path, sources)
    assert value["files"] == {"x": {"nbytes": 3}, "y": {"nbytes": 4, "xxh3_128": "ab"}}
    assert (read.tensors, read.beside, read.options) == (tensors, beside, options)
    assert read.files == files


def test_a_folder_whose_manifest_lists_no_tensor_is_not_verified(tmp_path: Path) -> None:
    source, out = tmp_path / "model", tmp_path / "out"
    source.mkdir()
    save_file({"w": np.ones(3, np.float32)}, source / "model.safetensors")
    reshard.convert(source, out)
    path = out / MANIFEST
    stated = json.loads(path.read_text())
    reshard.verify(out)
    path.write_text(json.dumps({**stated, "tensors": {}}))
    for against in (None, source):
        with pytest.raises(FormatError, match="it lists no tensor, so it proves nothing"):
            reshard.verify(out, against)
    with pytest.raises(FormatError, match="it lists no tensor"):
        reshard.diff(source, out)
    # Nor where it lists those of a file beside the model alone.
    save_file({"v": np.ones(3, np.float32)}, out / "v.safetensors")
    beside = {"v.safetensors": stated["tensors"]}
    for files in ({}, {"v.safetensors": {"nbytes": 1}}):
        changed = {**stated, "tensors": {}, "beside": beside, "files": files}
        path.write_text(json.dumps(changed))
        for against in (None, source):
            with pytest.raises(VerificationError, match="does not list this file"):
                reshard.verify(out, against)


@pytest.mark.parametrize(
    "damaged",
    [b"", b"{}", b"[]", b"\xff", b"[" * 100_000, b'{"options": {}, "names": {}, "tensors": 1}'],
    ids=["empty", "no section", "list", "no text", "deep", "wrong type"],
)
def test_a_damaged_file_is_refused(tmp_path: Path, damaged: bytes) -> None:
    (tmp_path / MANIFEST).write_bytes(damaged)
    with Sources() as sources, pytest.raises(FormatError, match="it is damaged"):
        manifest.read(tmp_path, sources)


def test_more_tensors_than_it_can_list_are_refused_before_they_are_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of 300,000 all were written, and then reshard could not read its own list of them."""
    monkeypatch.setattr(manifest, "_FEW", 1)
    monkeypatch.setattr(strict_json, "_MAX_HELD", 20_000)
    for count in (20, 60):
        specs = [TensorSpec(f"w{number}", FLOAT32, (4,)) for number in range(count)]
        tensors = {spec.name: Stated("float32", spec.shape, "0" * 32) for spec in specs}
        text = manifest.render("dcp", Origin(Path("x"), "torch"), {}, {}, tensors, {}, {})
        if count == 20:
            manifest.check_listable(specs)
            assert manifest.parsed(text, tmp_path).tensors.keys() == tensors.keys()
            continue
        with pytest.raises(PlanError, match="its 60 tensors are more than"):
            manifest.check_listable(specs)
        with pytest.raises(FormatError, match="more than reshard reads"):
            manifest.parsed(text, tmp_path)
