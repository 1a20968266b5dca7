"""What lies in a partial folder is damaged, forged or another's: the output is right or refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from functools import partial as given
from pathlib import Path

import pytest
import xxhash

import reshard
from reshard.core.tensors import stored
from reshard.formats import Selection, locate
from reshard.storage.local import Sources
from reshard.transfer import leftovers
from reshard.transfer.commit import OutputFolder
from tests.files import contents
from tests.hints.case import golden
from tests.resume.runs import (
    beside,
    codes,
    converter,
    facts,
    journal_of,
    killed,
    model,
    partial,
    small,
)

pytestmark = pytest.mark.heavy


@pytest.fixture(autouse=True)
def _small() -> Iterator[None]:
    with small():
        yield


class Interrupted:
    """A conversion that was killed half-way, and what an uninterrupted one gives."""

    def __init__(self, at: Path) -> None:
        self.at = model(at / "in")
        self.convert = converter(self.at / "trained", base=self.at / "base", max_shard_size=13000)
        self.out = at / "place" / "out"
        self.out.parent.mkdir()
        self.expected = self.convert(at / "whole")
        self.whole = contents(at / "whole")
        assert killed(given(self.convert, self.out), 34)
        self.own = partial(self.out)
        self.lines = journal_of(self.out).read_bytes().splitlines(keepends=True)
        assert sum(b'"piece"' in line for line in self.lines) > 6

    def resume(self) -> reshard.Report:
        """The report of a resumed run, whose output is right."""
        report = self.convert(self.out, resume=True)
        assert contents(self.out) == self.whole
        assert facts(report) == facts(self.expected)
        return report

    def write(self, lines: list[bytes]) -> None:
        journal_of(self.out).write_bytes(b"".join(lines))

    def message(self, report: reshard.Report, code: str = "resumed") -> str:
        (found,) = [f for f in report.findings if f.code == code]
        return found.message


@pytest.fixture
def run(tmp_path: Path) -> Interrupted:
    return Interrupted(tmp_path)


def signed(text: bytes) -> bytes:
    return b"%s %s\n" % (xxhash.xxh3_64_hexdigest(text).encode(), text)


def reused(report: reshard.Report) -> int:
    assert report.bytes_reused is not None
    return report.bytes_reused


def test_a_torn_journal(run: Interrupted) -> None:
    run.write([*run.lines[:-1], run.lines[-1][:-3]])
    report = run.resume()
    assert "torn or damaged" in run.message(report)
    assert reused(report)
    assert beside(run.out) == []


def test_an_empty_journal_and_none(run: Interrupted) -> None:
    run.write([])
    report = run.resume()
    assert "its journal is damaged, or of another version" in run.message(report, "not-resumed")
    assert reused(report) == 0
    assert beside(run.out) == []


def test_no_journal(run: Interrupted) -> None:
    journal_of(run.out).unlink()
    report = run.resume()
    assert "cannot be used (No such file" in run.message(report, "not-resumed")
    assert beside(run.out) == []


def test_an_edited_line_and_what_follows(run: Interrupted) -> None:
    whole = reused(run.resume())
    shutil.rmtree(run.out)
    assert killed(given(run.convert, run.out), 34)
    number = next(n for n, line in enumerate(run.lines) if b'"piece"' in line) + 4
    run.write([*run.lines[:number], run.lines[number].replace(b'"piece"', b'"peace"'),
               *run.lines[number + 1 :]])  # fmt: skip
    assert 0 < reused(run.resume()) < whole


def test_lines_that_are_forged_with_a_right_checksum(run: Interrupted) -> None:
    """Of another digest, of pieces that were never made, of files outside, of too much."""
    forged = []
    for line in run.lines:
        text = line.partition(b" ")[2].rstrip(b"\n")
        fields = json.loads(text)
        if fields[0] == "piece":
            fields[4] = "AAAAAAAAAAAAAAAAAAAAAA=="
            text = json.dumps(fields).encode()
        forged.append(signed(text))
    forged.append(signed(b'["piece","","layers.5.weight",0,"AAAAAAAAAAAAAAAAAAAAAA==",[]]'))
    forged.append(signed(b'["piece","../../x","/etc/passwd",0,"AAAAAAAAAAAAAAAAAAAAAA==",[]]'))
    forged.append(signed(b'["sealed","../../../precious",3]'))
    run.write(forged)
    precious = run.out.parent.parent / "precious"
    precious.write_text("abc")
    report = run.resume()
    assert reused(report) == 0
    assert "pieces made again, because their bytes had changed" in run.message(report)
    assert precious.read_text() == "abc"
    assert beside(run.out) == []


def test_bytes_that_were_changed_after_their_line(run: Interrupted) -> None:
    """In every file of it, one byte each: those pieces are made again, and no others."""
    files = [*(run.own / "tmp").iterdir(), *(run.own / "new").rglob("*.safetensors")]
    for path in files:
        data = bytearray(path.read_bytes())
        data[2500] ^= 0x10
        path.write_bytes(data)
    assert len(files) == 2
    report = run.resume()
    assert reused(report) > 0
    assert "pieces made again, because their bytes had changed" in run.message(report)


@pytest.mark.parametrize("change", ["cut off", "longer", "gone", "a folder", "emptied"])
def test_files_that_are_not_as_they_were(run: Interrupted, change: str) -> None:
    for path in (*(run.own / "tmp").iterdir(), *(run.own / "new").rglob("*.safetensors")):
        if change == "cut off":
            os.truncate(path, 3000)
        elif change == "longer":
            path.write_bytes(path.read_bytes() + b"more")
        elif change == "emptied":
            os.truncate(path, 0)
        else:
            path.unlink()
            if change == "a folder":
                path.mkdir()
                (path / "x").touch()
    run.resume()
    assert beside(run.out) == []


@pytest.mark.parametrize("where", ["tmp", "new"])
@pytest.mark.parametrize("kind", ["symbolic", "hard"])
def test_links_to_other_files_are_not_written_through(
    run: Interrupted, where: str, kind: str
) -> None:
    theirs = run.out.parent.parent / "theirs"
    name = "model-00001-of-00003.safetensors"
    named, unnamed = run.own / "new" / name, run.own / "tmp" / leftovers.temporary(name)
    if where == "new" and not named.exists():  # files are named by threads of their own
        unnamed.rename(named)
    places = [path for path in (run.own / where).iterdir() if path.is_file()]
    for number, path in enumerate(places):
        other = theirs.with_name(f"theirs{number}")
        shutil.copy(path, other)
        path.unlink()
        path.symlink_to(other) if kind == "symbolic" else path.hardlink_to(other)
    before = contents(theirs.parent)
    run.resume()
    after = contents(theirs.parent)
    names = [name for name in before if name.startswith("theirs")]
    assert names
    assert [after[name] for name in names] == [before[name] for name in names]
    assert not any(path.is_symlink() for path in run.out.rglob("*"))


@pytest.mark.parametrize("name", ["new", "tmp"])
def test_a_folder_of_it_that_is_a_link(run: Interrupted, name: str) -> None:
    theirs = run.out.parent.parent / "theirs"
    (run.own / name).rename(theirs)
    (run.own / name).symlink_to(theirs)
    before = contents(theirs)
    report = run.resume()
    assert "do not lie as reshard leaves them" in run.message(report, "not-resumed")
    assert contents(theirs) == before
    assert beside(run.out) == []


def test_the_partial_folder_is_a_link(run: Interrupted) -> None:
    theirs = run.out.parent.parent / "theirs"
    run.own.rename(theirs)
    run.own.symlink_to(theirs)
    before = contents(theirs)
    with pytest.raises(reshard.WriteError, match="no run of this user made it"):
        run.convert(run.out, resume=True)
    assert contents(theirs) == before
    assert not run.out.exists()


@pytest.mark.parametrize("change", ["another's", "unmarked", "of another output"])
def test_a_folder_that_is_not_ours(
    run: Interrupted, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    if change == "another's":
        mine = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    elif change == "unmarked":
        (run.own / leftovers.MARK).unlink()
    else:
        (run.own / leftovers.MARK).write_text('{"reshard": "1", "target": "other"}')
    before = contents(run.own)
    with pytest.raises(reshard.WriteError, match="no run of this user made it"):
        run.convert(run.out, resume=True)
    assert contents(run.own) == before


def test_of_another_version_of_reshard(run: Interrupted) -> None:
    lines = [line.partition(b" ")[2].rstrip(b"\n") for line in run.lines]
    first = json.loads(lines[0])
    first[2] = "0.0.1"
    run.write([signed(json.dumps(first).encode()), *run.lines[1:]])
    report = run.resume()
    assert "reshard 0.0.1 made it" in run.message(report, "not-resumed")
    assert beside(run.out) == []


@pytest.mark.parametrize("change", ["rewritten", "same times", "replaced", "touched"])
def test_a_source_that_changed_between(run: Interrupted, change: str) -> None:
    """Nothing of the old source gets into the output of the new one, and the file is named."""
    source = run.at / "trained" / "model.safetensors"
    status, data = source.stat(), bytearray(source.read_bytes())
    if change != "touched":
        data[-4] ^= 1
    if change == "replaced":
        source.rename(run.at / "old")
        source.write_bytes(data)
    elif change == "touched":
        source.touch()
    else:
        with source.open("r+b") as file:
            file.write(data)
    if change == "same times":
        os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
    run.convert(run.at / "anew")
    report = run.convert(run.out, resume=True)
    assert contents(run.out) == contents(run.at / "anew")
    assert (contents(run.out) == run.whole) == (change == "touched")
    assert reused(report) == 0
    assert str(source) in run.message(report, "not-resumed")
    assert beside(run.out) == []


def test_another_plan_has_another_folder(run: Interrupted) -> None:
    """It stays: who resumes with a mistyped option loses nothing. A plain run removes it."""
    other = run.convert(run.out, resume=True, dtype="float16")
    assert "other options or inputs" in run.message(other, "partial-output-kept")
    assert other.bytes_reused == 0
    assert beside(run.out) == [run.own.name]
    shutil.rmtree(run.out)
    assert reused(run.resume())
    shutil.rmtree(run.out)
    assert killed(given(run.convert, run.out), 34)
    report = run.convert(run.out, dtype="float16")
    assert codes(report).count("partial-output") == 1
    assert beside(run.out) == []


def test_a_source_that_is_damaged_is_refused_by_the_resumed_run(tmp_path: Path) -> None:
    """The killed run read the damaged bytes, and the checksum was not compared yet."""
    source = golden("zero2", tmp_path / "in")
    convert = converter(source)
    out = tmp_path / "out"
    reshard.convert(source, tmp_path / "right")
    (optim, *_) = sorted(source.rglob("*rank_0*optim_states.pt"))
    data = bytearray(optim.read_bytes())
    at = _middle_of_a_tensor(source, optim)
    data[at] ^= 1
    optim.write_bytes(data)
    with pytest.raises(reshard.FormatError, match="CRC-32"):
        convert(tmp_path / "plain")

    def refused() -> None:
        with suppress(reshard.FormatError):
            convert(out)

    after = 0
    while killed(refused, after):
        after += 3
        with pytest.raises(reshard.FormatError, match="CRC-32"):
            convert(out, resume=True)
        assert not out.exists()
    assert after > 6


def _middle_of_a_tensor(source: Path, file: Path) -> int:
    """An offset in a file's weights."""
    with Sources() as sources:
        entries = locate.read(source, sources, Selection()).entries.values()
        for extent in (extent for entry in entries for extent in stored(entry.fragments)):
            if extent.file.path == str(file) and extent.nbytes > 8:
                return extent.offset + extent.nbytes // 2
    raise AssertionError(file)


def test_checksums_that_are_forged_in_lines(tmp_path: Path) -> None:
    """A wrong CRC-32 of what was read does not refuse a source that is whole."""
    source = golden("zero2", tmp_path / "in")
    convert = converter(source)
    out = tmp_path / "place" / "out"
    out.parent.mkdir()
    convert(tmp_path / "whole")
    assert killed(given(convert, out), 6)
    lines, changed = journal_of(out).read_bytes().splitlines(keepends=True), 0
    forged = []
    for line in lines:
        fields = json.loads(line.partition(b" ")[2])
        for run in fields[5] if fields[0] == "piece" else ():
            run[3] ^= 1
            changed += 1
        forged.append(signed(json.dumps(fields).encode()))
    assert changed
    journal_of(out).write_bytes(b"".join(forged))
    report = convert(out, resume=True)
    assert report.bytes_reused
    assert contents(out) == contents(tmp_path / "whole")


def test_a_run_that_lives_is_not_continued(tmp_path: Path) -> None:
    """Its lock file was removed by hand; neither its folder is taken nor removed."""
    first = OutputFolder(tmp_path / "other", "digest")
    with first:
        (tmp_path / ".other.lock").unlink()
        for resume in (True, False):
            second = OutputFolder(tmp_path / "other", "digest", resume=resume)
            with pytest.raises(reshard.WriteError, match="another process writes into it"):
                second.__enter__()
        with OutputFolder(tmp_path / "other", "another plan") as third:
            (finding,) = third.findings
            assert finding.code == "partial-output-kept"
            assert "a process writes into it" in finding.message
        first.write("x", b"whole")
    assert not (tmp_path / "other").exists()
