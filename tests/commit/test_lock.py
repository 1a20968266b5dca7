"""The lock on an output's name, with flock and without."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from reshard.errors import WriteError
from reshard.transfer.lock import Owner, TargetLock, this_process


@pytest.fixture(params=["flock", "no flock"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "no flock":
        forget_flock(monkeypatch)
    return str(request.param)


def forget_flock(monkeypatch: pytest.MonkeyPatch, code: int = errno.ENOLCK) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", fail)


def kill_after_taking(path: Path, *, flock: bool, before: str = "") -> None:
    """A process that takes the lock and is killed, at the latest then; `before` runs first."""
    code = (
        "import errno, fcntl, os, sys\n"
        "def fail(*_): raise OSError(errno.ENOLCK, '')\n"
        f"if not {flock}: fcntl.flock = fail\n"
        "from pathlib import Path; from reshard.transfer.lock import TargetLock\n"
        f"{before}\n"
        "TargetLock(Path(sys.argv[1])).take(); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)])


def test_one_at_a_time(tmp_path: Path, system: str) -> None:
    first, second = TargetLock(tmp_path / "lock"), TargetLock(tmp_path / "lock")
    first.take()
    assert first.held
    with pytest.raises(WriteError, match=rf"process {os.getpid()} on .* is writing this output"):
        second.take()
    first.release()
    assert list(tmp_path.iterdir()) == []
    second.take()
    assert second.held
    assert not first.held
    second.release()
    assert list(tmp_path.iterdir()) == []


def test_a_removed_file_is_no_lock(tmp_path: Path, system: str) -> None:
    lock, other = TargetLock(tmp_path / "lock"), TargetLock(tmp_path / "lock")
    lock.take()
    (tmp_path / "lock").unlink()
    assert not lock.held
    other.take()
    lock.release()
    assert other.held, "the file of the other was removed"
    other.release()


def test_a_run_that_was_killed_holds_nothing(tmp_path: Path, system: str) -> None:
    """Its file is there still; the kernel let go of it, or its process is gone."""
    kill_after_taking(tmp_path / "lock", flock=system == "flock")
    assert (tmp_path / "lock").exists()
    lock = TargetLock(tmp_path / "lock")
    lock.take()
    assert lock.held
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_was_killed_as_it_removed_such_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had taken it aside; the next run removes it, with flock or without."""
    dead = msgspec.json.encode(changed(pid=2**22 + 1))
    (tmp_path / "lock").write_bytes(dead)
    kill_after_taking(
        tmp_path / "lock", flock=False, before="Path.unlink = lambda *_: os.kill(os.getpid(), 9)"
    )
    (aside,) = tmp_path.iterdir()
    assert aside.read_bytes() == dead
    for forget in (False, True):
        aside.write_bytes(dead)
        if forget:
            forget_flock(monkeypatch)
        lock = TargetLock(tmp_path / "lock")
        lock.take()
        lock.release()
        assert list(tmp_path.iterdir()) == []


def test_what_may_be_another_s_beside_the_lock_stays(tmp_path: Path, system: str) -> None:
    contents = {
        "lock.1": msgspec.json.encode(this_process()),
        "lock.2": msgspec.json.encode(changed(pid=2**22 + 1, host="elsewhere")),
        "lock.3": b"notes",
        "lock.4": b"",  # a run may be about to name itself
        "lock.txt": msgspec.json.encode(changed(pid=2**22 + 1)),
        "other.5": msgspec.json.encode(changed(pid=2**22 + 1)),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    long_ago = time.time() - 60
    os.utime(tmp_path / "lock.3", (long_ago, long_ago))
    os.mkfifo(tmp_path / "lock.6")
    (tmp_path / "lock.7").symlink_to("other.5")
    lock = TargetLock(tmp_path / "lock")
    lock.take()
    lock.release()
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name in contents}
    assert kept == contents
    assert {path.name for path in tmp_path.iterdir()} == {*contents, "lock.6", "lock.7"}


def changed(**fields: Any) -> Owner:
    return msgspec.structs.replace(this_process(), **fields)


@pytest.mark.parametrize(
    ("owner", "dead"),
    [
        (this_process(), False),
        (changed(started="1"), True),  # the number is another process's now
        (changed(pid=2**22 + 1), True),  # above the kernel's largest
        (changed(pid=2**22 + 1, host="elsewhere"), False),
        (changed(pid=2**22 + 1, boot="another"), False),
        (changed(pid=2**22 + 1, space="pid:[1]"), False),
        (changed(pid=2**80), False),
    ],
)
def test_only_a_process_that_is_certainly_gone_is_dead(owner: Owner, dead: bool) -> None:
    assert owner.dead is dead


def test_without_flock_another_machine_is_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget_flock(monkeypatch, errno.EOPNOTSUPP)
    content = msgspec.json.encode(changed(host="elsewhere", pid=7))
    (tmp_path / "lock").write_bytes(content)
    with pytest.raises(WriteError, match=r"process 7 on elsewhere .* remove this file"):
        TargetLock(tmp_path / "lock").take()
    assert (tmp_path / "lock").read_bytes() == content
    (tmp_path / "lock").unlink()  # as the hint says
    lock = TargetLock(tmp_path / "lock")
    lock.take()
    lock.release()


@pytest.mark.parametrize("content", [b"", b"{", b'{"pid": "x"}'])
def test_without_flock_a_file_that_names_nobody_holds_for_a_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    """Its maker may be about to write its name."""
    forget_flock(monkeypatch)
    (tmp_path / "lock").write_bytes(content)
    with pytest.raises(WriteError, match="another process is writing this output"):
        TargetLock(tmp_path / "lock").take()
    long_ago = time.time() - 60
    os.utime(tmp_path / "lock", (long_ago, long_ago))
    lock = TargetLock(tmp_path / "lock")
    lock.take()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_planted_link_is_not_followed(tmp_path: Path, system: str) -> None:
    (tmp_path / "precious").write_bytes(b"x")
    (tmp_path / "lock").symlink_to("precious")
    with pytest.raises(OSError, match="symbolic links"):
        TargetLock(tmp_path / "lock").take()
    assert (tmp_path / "precious").read_bytes() == b"x"
    assert (tmp_path / "lock").is_symlink()
