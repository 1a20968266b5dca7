"""The journal of finished pieces: what is written is read, and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import xxhash

from reshard.transfer import journal
from reshard.transfer.journal import Basis, Journal, Piece, StaleError
from reshard.transfer.notes import Notes

BASIS = Basis("a" * 32, {"/model/b": (2, 20, 200, 2000), "/model/a": (1, 10, 100, 1000)})
W = Piece("", "w", 0, b"0" * 16, ((0, 8, 16, 77), (1, 0, 4, 78)))
LATER = [Piece("", "w", 1, b"1" * 16), Piece("head", "w", 0, b"2" * 16)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A journal of three pieces, of two files."""
    path = tmp_path / "journal"
    made = Journal.begin(path, BASIS)
    made.note(W, 100)
    made.seal("first", 100)
    for piece in LATER:
        made.note(piece, 100)
    made.close()
    return path


def read(path: Path, basis: Basis = BASIS) -> list[Piece]:
    """The pieces that a resumed run finds, of those that may be there."""
    found = Journal.resume(path, basis)
    assert found.noted is not None
    pieces = [found.noted.piece(p.table, p.tensor, p.leaf) for p in (W, *LATER)]
    found.close()
    assert [p for p in pieces if p is not None] == [p for p in (W, *LATER) if p in pieces]
    return [piece for piece in pieces if piece is not None]


def lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def test_what_was_noted_is_read(path: Path) -> None:
    assert read(path) == [W, *LATER]
    found = Journal.resume(path, BASIS)
    assert found.noted is not None
    assert found.noted.sealed == {"first": journal.Sealed("first", 100)}
    assert (found.noted.damaged, len(found.noted)) == (False, 3)
    assert found.sources == ["/model/a", "/model/b"]
    assert found.noted.piece("", "v", 0) is None
    found.close()


def test_a_resumed_run_goes_on_where_lines_are_whole(path: Path) -> None:
    whole = path.read_bytes()
    for cut in range(len(whole) - len(lines(path)[-1]) + 1, len(whole)):
        path.write_bytes(whole[:cut])
        again = Journal.resume(path, BASIS)
        assert again.noted is not None
        assert again.noted.damaged
        again.note(LATER[1], 100)
        again.close()
        assert path.read_bytes() == whole


def test_the_last_line_of_a_piece_counts(path: Path) -> None:
    other = Piece("", "w", 0, b"9" * 16)
    again = Journal.resume(path, BASIS)
    again.note(other, 100)
    again.close()
    found = Journal.resume(path, BASIS)
    assert found.noted is not None
    assert found.noted.piece("", "w", 0) == other
    found.close()


@pytest.mark.parametrize("number", range(7))
def test_any_byte_that_changes_ends_what_is_used(path: Path, number: int) -> None:
    """Of the opening, nothing is used; of a later line, what stands before."""
    parts = lines(path)
    for index in range(0, len(parts[number]), 5):
        line = bytearray(parts[number])
        line[index] ^= 1
        path.write_bytes(b"".join([*parts[:number], bytes(line), *parts[number + 1 :]]))
        if number < 3:
            with pytest.raises(StaleError, match="damaged"):
                Journal.resume(path, BASIS)
        else:
            assert read(path) == [W, *LATER][: [0, 1, 1, 2][number - 3]]


@pytest.mark.parametrize(
    "text",
    [
        b'["piece","","x",0,"MDAwMDAwMDAwMDAwMDAwMA==",[[2,0,4,1]]]',  # a source that is not there
        b'["piece","","x",0,"MDAwMDAwMDAwMDAwMDAwMA==",[[0,4,4,1]]]',  # no bytes
        b'["piece","","x",0,"MDAwMDAwMDAwMDAwMDAwMA==",[],1]',  # more than a line has
        b'["piece","","x","0","MDAwMDAwMDAwMDAwMDAwMA==",[]]',
        b'["sealed","../../x"]',
        b'["reshard",1,"0",""]',
        b'["source","/model/c",[1]]',
        b"[]",
        b"{}",
        b"\xff",
        b"",
    ],
)
def test_whole_lines_that_are_none_of_ours(path: Path, text: bytes) -> None:
    """Their checksum is right; what follows is not used."""
    first, *rest = lines(path)
    line = b"%s %s\n" % (xxhash.xxh3_64_hexdigest(text).encode(), text)
    path.write_bytes(b"".join([first, *rest[:3], line, *rest[3:]]))
    assert read(path) == [W]


def test_of_another_conversion(path: Path) -> None:
    with pytest.raises(StaleError, match="its plan is different"):
        Journal.resume(path, Basis("b" * 32, BASIS.sources))
    other = {**BASIS.sources, "/model/b": (2, 20, 200, 2001)}
    with pytest.raises(StaleError, match="has changed") as stale:
        Journal.resume(path, Basis(BASIS.plan, other))
    assert stale.value.source == "/model/b"
    with pytest.raises(StaleError):
        Journal.resume(path, Basis(BASIS.plan, {**BASIS.sources, "/model/c": (3,)}))


def test_of_another_version(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "__version__", "99")
    with pytest.raises(StaleError, match="and this is 99"):
        Journal.resume(path, BASIS)


def test_one_process_at_a_time(path: Path) -> None:
    held = Journal.resume(path, BASIS)
    with pytest.raises(BlockingIOError):
        Journal.resume(path, BASIS)
    held.close()
    assert read(path) == [W, *LATER]


@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
def test_what_is_not_a_file(path: Path, kind: str) -> None:
    moved = path.rename(path.with_name("moved"))
    if kind == "link":
        path.symlink_to(moved)
    elif kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    with pytest.raises((OSError, StaleError)):
        Journal.resume(path, BASIS)


def test_another_users(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    with pytest.raises(StaleError, match="not a file of this user"):
        Journal.resume(path, BASIS)


def test_names_that_are_not_text(tmp_path: Path) -> None:
    basis = Basis("a", {"/model/\udcff": (1,)})
    piece = Piece("", "w", 0, b"0" * 16)
    made = Journal.begin(tmp_path / "journal", basis)
    made.note(piece, 1)
    made.close()
    again = Journal.resume(tmp_path / "journal", basis)
    assert again.noted is not None
    assert again.noted.piece("", "w", 0) == piece
    again.close()


def test_a_disk_that_takes_no_more_ends_the_journal(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    again = Journal.resume(path, BASIS)
    monkeypatch.setattr(journal, "write_fully", fail)
    again.note(Piece("", "x", 0, b"3" * 16), 1 << 30)
    monkeypatch.undo()
    again.note(Piece("", "x", 1, b"3" * 16), 1 << 30)
    again.seal("second", 1)
    again.close()
    assert read(path) == [W, *LATER]


def test_a_line_that_is_too_long_to_be_read_ends_nothing(path: Path) -> None:
    """A piece of very many stretches is not noted, on the disk and in a store; later ones are."""
    long = Piece("", "v", 0, b"3" * 16, tuple((0, 2 * n, 2 * n + 1, n) for n in range(100_000)))
    later = Piece("", "v", 1, b"4" * 16)
    again = Journal.resume(path, BASIS)
    stored: dict[str, bytes] = {}
    notes = Notes(stored.__setitem__, BASIS)
    for one in (long, later):
        again.note(one, 100)
        notes.note(one, 100)
    again.close()
    notes.flush()
    found = Journal.resume(path, BASIS)
    for noted in (found.noted, Notes(stored.__setitem__, BASIS, stored).noted):
        assert noted is not None
        assert not noted.damaged
        assert noted.piece("", "v", 0) is None
        assert noted.piece("", "v", 1) == later
    found.close()
