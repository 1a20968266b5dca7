"""Files that repeat each other: what counts as a repetition, and what does not."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from reshard.containers.torch import Known, archive, directory, read, reader
from reshard.errors import ReshardError
from reshard.storage.local import Sources


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many directories and pickles are parsed."""
    counts: Counter[str] = Counter()
    entries, pickle = directory.parse_entries, reader._parse

    def counted_entries(raw: bytes, count: int) -> Any:
        counts["directories"] += 1
        return entries(raw, count)

    def counted_pickle(*args: Any, **named: Any) -> Any:
        counts["pickles"] += 1
        return pickle(*args, **named)

    monkeypatch.setattr(archive, "parse_entries", counted_entries)
    monkeypatch.setattr(reader, "_parse", counted_pickle)
    return counts


def saved(path: Path, device: str, monkeypatch: pytest.MonkeyPatch, **more: Any) -> Path:
    """A file whose storages are of a device that this machine lacks."""
    content = {"module": {f"w{i}": torch.empty(0) for i in range(5)}, "steps": 3, **more}
    # A text of its own for each, as torch makes it.
    monkeypatch.setattr(torch.serialization, "location_tag", lambda _: " ".join([device])[:])
    torch.save(content, path)
    return path


def each(*paths: Path) -> list[Any]:
    known = Known()
    with Sources() as sources:
        return [read(sources.open(path), known=known) for path in paths]


def test_files_that_differ_by_their_names_and_devices_are_parsed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parsed: Counter[str]
) -> None:
    paths = [saved(tmp_path / f"rank_{n}.pt", f"cuda:{n % 3}", monkeypatch) for n in range(6)]
    files = each(*paths)
    # A directory states the checksum of the pickle, and so knows the device.
    assert parsed == {"directories": 3, "pickles": 1}
    assert all(file.value is files[0].value for file in files)
    assert [file.written_as for file in files] == [f"rank_{n}" for n in range(6)]


@pytest.mark.parametrize("where", ["value", "key", "part of a name", "bytes"])
def test_a_device_that_the_value_shows_is_another_value(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parsed: Counter[str]
) -> None:
    def shown(device: str) -> object:
        return {
            "value": {"device": device},
            "key": {device: 1},
            "part of a name": [("x", {"y": f"model.{device}.weight"})],
            "bytes": device.encode(),
        }[where]

    paths = [
        saved(tmp_path / f"{n}.pt", f"cuda:{n}", monkeypatch, more=shown(f"cuda:{n}"))
        for n in range(2)
    ]
    files = each(*paths)
    assert [file.value["more"] for file in files] == [shown("cuda:0"), shown("cuda:1")]
    assert parsed["pickles"] == 2


def test_names_that_look_like_devices_are_not_taken_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two pickles of equal length that differ where a name, and no device, stands."""
    one = saved(tmp_path / "1.pt", "cuda:0", monkeypatch, more={"cuda:7": 1})
    other = saved(tmp_path / "2.pt", "cuda:0", monkeypatch, more={"cuda:8": 1})
    files = each(one, other)
    assert [list(file.value["more"]) for file in files] == [["cuda:7"], ["cuda:8"]]


@pytest.mark.parametrize("where", ["directory", "pickle", "header of the pickle"])
def test_damage_to_a_file_like_another_is_found_as_before(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = saved(tmp_path / "rank_0.pt", "cuda:0", monkeypatch)
    bad = saved(tmp_path / "rank_1.pt", "cuda:1", monkeypatch)
    raw = bytearray(bad.read_bytes())
    at = {
        "directory": raw.index(b"PK\1\2") + 10,  # the method of compression
        "pickle": raw.index(b"steps") + 1,
        "header of the pickle": raw.index(b"rank_1/data.pkl"),
    }[where]
    raw[at] ^= 1
    bad.write_bytes(raw)
    with pytest.raises(ReshardError) as alone:
        each(bad)
    with pytest.raises(ReshardError) as beside:
        each(good, bad)
    assert str(beside.value) == str(alone.value)


def streamed(path: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that was written as a stream: it does not hold its own name."""
    saved(path, device, monkeypatch)
    content = {"module": {f"w{i}": torch.empty(0) for i in range(5)}, "steps": 3}
    with path.open("wb") as file:
        torch.save(content, file)
    return path


def test_directories_that_differ_by_checksums_are_parsed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parsed: Counter[str]
) -> None:
    paths = [streamed(tmp_path / f"{n}.pt", f"cuda:{n % 3}", monkeypatch) for n in range(6)]
    files = each(*paths)
    assert parsed == {"directories": 1, "pickles": 1}
    assert all(file.value is files[0].value for file in files)


@pytest.mark.parametrize("name", [b"data.pkl", b"data/0", b"version", b".data/serialization_id"])
def test_checksums_that_are_wrong_are_found_as_before(
    name: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = streamed(tmp_path / "0.pt", "cuda:0", monkeypatch)
    for number, device in enumerate(("cuda:0", "cuda:1")):
        bad = streamed(tmp_path / f"bad{number}.pt", device, monkeypatch)
        raw = bytearray(bad.read_bytes())
        at = raw.rindex(b"archive/" + name) - 46
        assert raw[at : at + 4] == b"PK\1\2"
        for wrong in (b"\0\0\0\0", b"abcd"):
            raw[at + 16 : at + 20] = wrong
            bad.write_bytes(raw)
            outcomes = []
            for before in ((), (good,)):
                try:
                    outcomes.append(each(*before, bad)[-1].warnings)
                except ReshardError as error:
                    outcomes.append((str(error),))
            assert outcomes[0] == outcomes[1]


def test_a_directory_that_holds_the_folder_elsewhere_is_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parsed: Counter[str]
) -> None:
    """An entry named after another folder is not of this file's folder."""
    one = saved(tmp_path / "rank_0.pt", "cuda:0", monkeypatch)
    raw = saved(tmp_path / "rank_1.pt", "cuda:0", monkeypatch).read_bytes()
    at = raw.rindex(b"rank_1/data/0")
    (tmp_path / "rank_1.pt").write_bytes(raw[:at] + b"rank_0" + raw[at + 6 :])
    with pytest.raises(ReshardError, match="zip archive"):
        each(one, tmp_path / "rank_1.pt")
    assert parsed["directories"] == 2


def test_a_stream_has_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parsed: Counter[str]
) -> None:
    monkeypatch.setattr(torch.serialization, "location_tag", lambda _: "cuda:1")
    stream = io.BytesIO()
    torch.save({"w": torch.empty(0)}, stream)
    for number in range(2):
        (tmp_path / f"{number}.pt").write_bytes(stream.getvalue())
    files = each(tmp_path / "0.pt", tmp_path / "1.pt")
    assert {file.written_as for file in files} == {"archive"}
    assert parsed == {"directories": 1, "pickles": 1}
