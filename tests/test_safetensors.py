"""Hostile safetensors files and JSON: each is one plain error, soon and cheaply."""

from __future__ import annotations

import json
import reprlib
import struct
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

import reshard
from reshard.errors import FormatError, IncompleteError, ReshardError, UnsupportedError
from reshard.storage import strict_json

# Of processor time.
SECONDS = 5.0
GOOD = {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}


def written(
    folder: Path, header: bytes, data: bytes = bytes(64), length: int | None = None
) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def refused(path: Path, kind: type[ReshardError], words: str) -> None:
    start = time.process_time()
    with pytest.raises(kind) as caught:
        reshard.open(path)
    assert time.process_time() - start < SECONDS
    assert words in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000
    assert caught.value.path == str(path)


def entry(**changed: Any) -> bytes:
    return json.dumps({"a": GOOD | changed}).encode()


def test_the_header_is_good_when_nothing_is_changed(tmp_path: Path) -> None:
    assert reshard.open(written(tmp_path, entry())).tensors["a"].shape == (16,)
    written(tmp_path, entry(shape=[1] * 31 + [16]))
    assert len(reshard.open(tmp_path / "model.safetensors").tensors["a"].shape) == 32


@pytest.mark.parametrize(
    "changed",
    [
        {"shape": [-16]},
        {"shape": [16.0]},
        {"shape": [True, 16]},
        {"shape": [float("nan")]},
        {"shape": [float("inf")]},
        {"shape": ["16"]},
        {"shape": "ab"},
        {"shape": [10**4000]},
        {"shape": [1 << 32, 1 << 32]},
        {"shape": [1 << 61, 1 << 61, 0], "data_offsets": [0, 0]},
        {"shape": [1] * 32 + [16]},
        {"shape": [1 << 61] * 200_000},
        {"data_offsets": [-64, 0]},
        {"data_offsets": [0, 1 << 62]},
        {"data_offsets": ["a", "b"]},
        {"dtype": "F4", "shape": [3]},
    ],
    ids=reprlib.repr,
)
def test_numbers_that_are_no_tensors(tmp_path: Path, changed: dict[str, Any]) -> None:
    path = written(tmp_path, entry(**changed))
    refused(
        path, FormatError, "cannot be stored as pairs" if "dtype" in changed else "is impossible"
    )


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (entry(data_offsets=[0]), "malformed"),
        (entry(data_offsets=None), "malformed"),
        (entry(shape=5), "malformed"),
        (entry(dtype=["F32"]), "malformed"),
        (b'{"a":5}', "malformed"),
        (b'{"a":{}}', "malformed"),
        (b"[]", "begins with b'[]', not with"),
        (b"\xef\xbb\xbf{}", "not with '{'"),
        (b" {}", "begins with white space"),
        (b"\r\n\t{}", "begins with white space"),
        (entry()[:-1], "cannot be read"),
        (b'{"a":1,"a":2}', "a key occurs twice"),
        (b'{"__metadata__":{"a":1}}', "not a table of strings"),
        (b'{"__metadata__":[]}', "not a table of strings"),
        (b'{"\xff":{}}', "cannot be read"),
        (b'{"a\\uD800":{}}', "cannot be read"),
        (b'{"a":' + b"9" * 5000 + b"}", "cannot be read"),
        (b'{"a":' + b"[" * 3_000_000 + b"}", "more than reshard reads"),
        (b'{"a":' + b"[" * 90_000 + b"}", "nested too deeply"),
        (b'{"a":[' + b"{}," * 20_000_000 + b"{}]}", "more than reshard reads"),
    ],
    ids=lambda value: value[:24] if isinstance(value, bytes) else value,
)
def test_a_header_that_is_none(tmp_path: Path, header: bytes, words: str) -> None:
    refused(written(tmp_path, header), FormatError, words)


@pytest.mark.parametrize("code", ["Q17", "F" * 100_000, "\x1b[31m"], ids=["Q17", "long", "steers"])
def test_a_dtype_that_is_not_known(tmp_path: Path, code: str) -> None:
    refused(written(tmp_path, entry(dtype=code)), UnsupportedError, "is not supported")


def pair(one: list[int], two: list[int]) -> bytes:
    both = {"a": GOOD | {"data_offsets": one}, "b": GOOD | {"data_offsets": two}}
    return json.dumps(both).encode()


@pytest.mark.parametrize(
    "header",
    [
        pair([0, 64], [32, 96]),
        pair([0, 64], [65, 129]),
        pair([0, 64], [0, 64]),
        pair([1, 65], [65, 129]),
    ],
    ids=["overlap", "gap", "the same place", "gap at the start"],
)
def test_tensors_that_do_not_tile(tmp_path: Path, header: bytes) -> None:
    refused(written(tmp_path, header, bytes(129)), FormatError, "but must be")


@pytest.mark.parametrize(
    ("length", "kind", "words"),
    [
        (1 << 63, FormatError, "its header would have 9223372036854775808"),
        ((1 << 64) - 1, FormatError, "its header would have"),
        (100_000_001, FormatError, "its header would have 100000001"),
        (1000, IncompleteError, "bytes 8 to 1008 are needed"),
        (0, FormatError, "not with '{'"),
    ],
)
def test_lengths_of_a_header(
    tmp_path: Path, length: int, kind: type[ReshardError], words: str
) -> None:
    refused(written(tmp_path, entry(), length=length), kind, words)


def test_files_of_another_length(tmp_path: Path) -> None:
    refused(written(tmp_path, entry(), bytes(63)), IncompleteError, "its header describes")
    refused(written(tmp_path, entry(), bytes(65)), FormatError, "its header describes")
    (tmp_path / "model.safetensors").write_bytes(b"1234567")
    refused(tmp_path / "model.safetensors", IncompleteError, "at least 8 bytes")


def test_what_the_hint_for_white_space_says_helps(tmp_path: Path) -> None:
    path = written(tmp_path, b" " + entry())
    refused(path, FormatError, "save it again")
    save_file(load_file(path), path)
    assert reshard.open(path).tensors["a"].shape == (16,)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\n", "Run `git lfs pull`"),
        (b"<!DOCTYPE html><html>404</html>", "a web page or XML, not a safetensors file"),
        (b"PK\x03\x04" + bytes(60), "a zip archive, as torch.save writes them, not a safetensors"),
        (bytes(600), "zero: space was reserved and never written"),
        (b"GGUF" + bytes(60), "a GGUF file, not a safetensors file"),
    ],
)
def test_other_files_under_the_name_of_a_model(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    refused(path, ReshardError, words)


def spelt(text: bytes) -> bytes:
    """A header around the entry of a tensor `a`."""
    return b'{"a":{"dtype":"BF16","shape":[16],"data_offsets":[0,32]},' + text + b"}"


@pytest.mark.parametrize(
    "header",
    [
        b'{"__metadata__":{"x":"}"},' + spelt(b'"b":{"dtype":"BF16","shape":[],"more":[1.5],'
                                              b'"data_offsets":[32,34]}')[1:],
        spelt(b'"__metadata__":{"x":"}"},"b":{"dtype":"BF16","shape":[],"data_offsets":[32,34]}'),
        spelt(b' "b": {"shape": [], "dtype": "BF16", "data_offsets": [32, 34]}'),
    ],
    ids=["a field more", "metadata last", "other order and spaces"],
)  # fmt: skip
def test_headers_that_are_spelt_in_other_ways(tmp_path: Path, header: bytes) -> None:
    tensors = reshard.open(written(tmp_path, header, bytes(34))).tensors
    assert {name: tensor.shape for name, tensor in tensors.items()} == {"a": (16,), "b": ()}


def test_more_tensors_are_read_than_json_of_any_kind_may_have_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of 200,000 small tensors, which reshard itself writes, is within the budget."""
    names = [f"layers.{number}.weight" for number in range(500)]
    places = {name: [place * 32, place * 32 + 32] for place, name in enumerate(names)}
    header = {
        name: {"dtype": "BF16", "shape": [16], "data_offsets": place}
        for name, place in places.items()
    }
    path = written(tmp_path, json.dumps(header, separators=(",", ":")).encode(), bytes(32 * 500))
    monkeypatch.setattr(strict_json, "_MAX_HELD", 500 * 11 * 80)
    assert list(reshard.open(path).tensors) == names
    monkeypatch.setattr(strict_json, "_MAX_HELD", 500 * 11 * 40)
    refused(path, FormatError, "more than reshard reads")
