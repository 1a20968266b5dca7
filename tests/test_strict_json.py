"""JSON from outside: what is accepted, and that nothing costs more than the budget."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reshard.diagnosis import tokens
from reshard.errors import FormatError
from reshard.storage import strict_json
from reshard.storage.local import Sources
from tests.budget import MEMORY, MIB, SECONDS, check_refused, needs_proc, run

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20
)


@given(VALUES, st.booleans(), st.sampled_from([None, 1]))
def test_what_python_writes_is_read_equal(value: Any, ascii_only: bool, indent: int | None) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    if re.search("[\ud800-\udfff]", text):
        return
    assert strict_json.parse(text.encode(), "x") == value


@given(st.dictionaries(st.text(':a"\\', max_size=4), st.integers(), min_size=1), st.data())
def test_a_key_twice_is_refused_whatever_the_names_hold(
    members: dict[str, int], data: st.DataObject
) -> None:
    items = [f"{json.dumps(key)} : {value}" for key, value in members.items()]
    strict_json.parse(f"[{{{','.join(items)}}}]", "x")
    items.insert(
        data.draw(st.integers(0, len(items))), data.draw(st.sampled_from(items)).replace(": ", ":")
    )
    with pytest.raises(FormatError, match="a key occurs twice"):
        strict_json.parse(f"[{{{','.join(items)}}}]", "x")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "cannot be read"),
        (b"{", "cannot be read"),
        (b'{"a":1,}', "cannot be read"),
        (b"{'a':1}", "cannot be read"),
        (b'{"a":01}', "cannot be read"),
        (b'{"a":"\xff"}', "cannot be read"),
        (b'{"a":"\xed\xa0\x80"}', "cannot be read"),
        (b'{"a":"\\ud800"}', "cannot be read"),
        (b'{"a":"\\ud800","b":NaN}', "cannot be read"),
        (b'{"a":"\n"}', "cannot be read"),
        (b'{"a":1} {}', "cannot be read"),
        ('{"a":1}'.encode("utf-16"), "cannot be read"),
        (b'{"a":1,"a":1}', "a key occurs twice"),
        (b'{"a":1,"\\u0061":1}', "a key occurs twice"),
        (b'{"a":{"b":[{"c":":","c":0}]}}', "a key occurs twice"),
        (b'{"a":NaN,"a":1}', "a key occurs twice"),
        (b"\xef\xbb\xbf{}", "byte order mark"),
        (b'{"a":' + b"[" * 101 + b"]" * 101 + b"}", "nested deeper than 100"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
        (b'{"a":[NaN,' + b"[" * 100_000 + b"]" * 100_000 + b"]}", "nested too deeply"),
        (b'{"a":' + b"9" * 10_000 + b"}", "cannot be read"),
        (b"[]", "not an object"),
        (b"null", "not an object"),
    ],
    ids=lambda value: repr(value[:24]) if isinstance(value, bytes) else "",
)
def test_what_is_refused(text: bytes, words: str) -> None:
    with pytest.raises(FormatError, match=words) as caught:
        strict_json.parse_object(text, "folder/config.json")
    assert str(caught.value).startswith("folder/config.json: ")
    assert len(str(caught.value)) < 300


def test_what_python_accepts_beyond_json_is_accepted() -> None:
    value = strict_json.parse_object(
        b'{"a": [0.0, Infinity], "b": 1e400, "c": ' + b"9" * 40 + b"}", "x"
    )
    assert value == {"a": [0.0, float("inf")], "b": float("inf"), "c": int("9" * 40)}


def test_a_mark_is_refused_where_transformers_refuses_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    path = tmp_path / "config.json"
    path.write_bytes(b'\xef\xbb\xbf{"model_type": "llama"}')
    with pytest.raises((OSError, ValueError)):
        transformers.PretrainedConfig.from_pretrained(tmp_path)
    with Sources() as sources, pytest.raises(FormatError, match="byte order mark") as caught:
        strict_json.read_object(sources.open(path))
    assert "Save it as UTF-8 without one" in str(caught.value)
    path.write_bytes(path.read_bytes()[3:])
    assert strict_json.read_file(path) == {"model_type": "llama"}


def test_no_other_module_parses_json_or_reads_a_text_whole() -> None:
    parses = re.compile(r"json\.loads?\(|msgspec\.json\.decode|\.read_text\(|\.read_bytes\(")
    # The one reader; our own files in the package; the kernel's; what pip wrote of an installed
    # package; the small marks that reshard leaves itself, read to a limit; a prompt of the user;
    # the user's credentials, and what a server answers, read to a limit.
    own = {
        "storage/strict_json.py", "evaluate/texts.py", "evaluate/page.py", "evaluate/memory.py",
        "pages/page.py", "cli/topics.py",
        "formats/info.py", "transfer/lock.py", "transfer/leftovers.py", "transfer/memory.py",
        "storage/credentials.py", "storage/hub.py", "storage/web.py", "transfer/cluster/keeper.py",
    }  # fmt: skip
    root = Path(strict_json.__file__).parents[1]
    found = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if parses.search(path.read_text()) and "testing" not in path.parts
    }
    assert found <= own


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (b'{"model":{"vocab":{"a":0,"b":7},"merges":[["a","b"]]},"added_tokens":[{"id":9}]}', 10),
        (b'{"model":{"vocab":[["a",-1.5],["[b",-2]]},"added_tokens":[]}', 2),
        (b'{"model":{"vocab":{"a":[1]}}}', None),
        (b'{"model":{"vocab":{"a":1,"a":2}}}', None),
        (b'{"model":[],"added_tokens":{}}', 0),
        (b"\xff", None),
    ],
)
def test_the_tokens_of_a_tokenizer(tmp_path: Path, text: bytes, count: int | None) -> None:
    (tmp_path / "tokenizer.json").write_bytes(text)
    with Sources() as sources:
        assert tokens.count(tmp_path, sources) == count


# What fills a large JSON list or object: each exhausts memory in a way of its own.
FILLERS = {
    "objects": b'{"a":1},',
    "lists": b"[[],[]],",
    "texts": b'"ab",',
    "numbers": b"1000,",
    "one text": b"a" * 1000,
    "one wide text": b"a" * 1000,
}


def fill(path: Path, before: bytes, filler: bytes, after: bytes, nbytes: int) -> None:
    with open(path, "wb") as file:
        file.write(before)
        piece = filler * (MIB // len(filler))
        for _ in range(nbytes // len(piece)):
            file.write(piece)
        file.write(after)


def filled(path: Path, key: str, filler: str, nbytes: int) -> None:
    """A JSON object of `nbytes` with one field, of what `FILLERS` says."""
    opening, closing = ('"', '😀"') if filler.startswith("one") else ("[", "0]")
    if filler == "one text":
        closing = '"'
    fill(path, f'{{"{key}":{opening}'.encode(), FILLERS[filler], f"{closing}}}".encode(), nbytes)


def manifest_file(folder: Path) -> list[str | Path]:
    filled(folder / "reshard.json", "options", "objects", 250_000_000)
    return ["verify", folder]


def manifest_of_tensors(folder: Path) -> list[str | Path]:
    line = b'"%07d":{"dtype":"","shape":[],"xxh3_128":""},'
    lines = b"".join(line % number for number in range(340_000))  # more are refused unread
    (folder / "reshard.json").write_bytes(b'{"tensors":{' + lines[:-1] + b"}}")
    return ["verify", folder]


def index(folder: Path) -> list[str | Path]:
    (folder / "model.safetensors").write_bytes(b"")
    filled(folder / "model.safetensors.index.json", "weight_map", "objects", 120_000_000)
    return ["inspect", folder]


def torch_index(folder: Path) -> list[str | Path]:
    filled(folder / "pytorch_model.bin.index.json", "weight_map", "texts", 120_000_000)
    return ["inspect", folder]


def config(folder: Path) -> list[str | Path]:
    filled(folder / "config.json", "a", "objects", 15_000_000)
    (folder / "model.safetensors").write_bytes(b"")
    return ["doctor", folder, "--base", folder / ".." / folder.name]


def huge_config(folder: Path) -> list[str | Path]:
    filled(folder / "config.json", "a", "one text", 500_000_000)
    (folder / "model.safetensors").write_bytes(b"")
    return ["inspect", folder, "--base", folder]


def pointer(folder: Path) -> list[str | Path]:
    for name in ("blobs", "refs", "snapshots/a", "snapshots/b"):
        (folder / name).mkdir(parents=True)
    with open(folder / "refs" / "main", "wb") as file:
        file.truncate(20_000_000_000)
    return ["inspect", folder]


def header(filler: str, nbytes: int) -> Callable[[Path], list[str | Path]]:
    def write(folder: Path) -> list[str | Path]:
        path = folder / "header"
        filled(path, "a", filler, nbytes)
        text = path.read_bytes()
        (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
        path.unlink()
        return ["inspect", folder]

    return write


HOSTILE = {
    "manifest": manifest_file,
    "manifest of tensors": manifest_of_tensors,
    "index": index,
    "torch index": torch_index,
    "config": config,
    "huge config": huge_config,
    "refs/main": pointer,
    **{f"header of {name}": header(name, 98_000_000) for name in FILLERS},
    # As much as is read, about.
    "parsed header of objects": header("objects", 4_000_000),
    "parsed header of lists": header("lists", 4_000_000),
    "parsed header of texts": header("texts", 8_000_000),
    "parsed header of one wide text": header("one wide text", 33_000_000),
}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    for path in tmp_path.iterdir():
        if path.is_file():
            path.unlink()


@pytest.mark.heavy
@needs_proc
@pytest.mark.parametrize("name", list(HOSTILE))
def test_a_hostile_file_is_refused_within_the_budget(folder: Path, name: str) -> None:
    check_refused(*HOSTILE[name](folder))


@pytest.mark.heavy
@needs_proc
@pytest.mark.parametrize("filler", ["objects", "texts", "one wide text"])
def test_a_hostile_tokenizer_costs_no_more(folder: Path, filler: str) -> None:
    (folder / "config.json").write_bytes(b"{}")
    header = b"{}      "
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    filled(folder / "tokenizer.json", "added_tokens", filler, 45_000_000)
    seconds, peak, said = run("doctor", folder)
    assert "Traceback" not in said
    assert seconds < SECONDS
    assert peak < MEMORY, f"{peak // MIB} MiB"


@pytest.mark.heavy
@needs_proc
def test_a_giant_model_is_read_within_the_budget(folder: Path) -> None:
    """Two shards of 100,000 tensors, and the index of all of them."""
    listed: dict[str, str] = {}
    for shard in range(2):
        names = [
            f"model.language_model.layers.{shard}.mlp.experts.{number}.gate_up_proj.weight"
            for number in range(100_000)
        ]
        header = {
            name: {"dtype": "BF16", "shape": [2, 1], "data_offsets": [4 * n, 4 * n + 4]}
            for n, name in enumerate(names)
        }
        text = json.dumps(header, separators=(",", ":")).encode()
        file = f"model-{shard + 1:05d}-of-00002.safetensors"
        data = bytes(4 * len(names))
        (folder / file).write_bytes(len(text).to_bytes(8, "little") + text + data)
        listed |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": listed}, indent=2)
    )
    _, peak, said = run("inspect", folder)
    assert "200000 tensors" in said or "200,000 tensors" in said
    assert peak < MEMORY, f"{peak // MIB} MiB"
