"""Runs into a store that are killed: what they leave is reused, removed or refused, and named."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

import reshard
from reshard.cli.app import reshard as command
from reshard.core.locations import located
from reshard.storage import uploads
from reshard.transfer import claims
from reshard.transfer.lock import Owner
from tests.remote.killed import Killer, tiny
from tests.remote.server import BUCKET, Bucket, Fault, Request
from tests.remote.store_runs import CLAIM, OUT, Run, forge
from tests.resume.runs import codes, facts


@pytest.fixture(scope="module")
def killer() -> Iterator[Killer]:
    made = Killer()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _tiny() -> Iterator[None]:
    with tiny():
        yield


@pytest.fixture
def run(killer: Killer, bucket: Bucket, tmp_path: Path) -> Run:
    return Run(killer, bucket, tmp_path)


@pytest.mark.parametrize(
    ("to", "step"),
    [
        ("hf", 48),
        pytest.param("hf", 7, marks=pytest.mark.slow),
        pytest.param("dcp", 11, marks=pytest.mark.slow),
    ],
)
def test_the_same_bytes_wherever_it_was_killed(
    killer: Killer, bucket: Bucket, tmp_path: Path, to: str, step: int
) -> None:
    options = {"to": "dcp", "base": None, "max_shard_size": 9000} if to == "dcp" else {}
    run = Run(killer, bucket, tmp_path, **options)
    reused, after = [], 0
    while run.killed(after):
        report = run.convert(resume=True)
        run.assert_whole()
        assert facts(report) == facts(run.expected)
        assert report.bytes_reused is not None
        assert report.bytes_read <= run.expected.bytes_read
        assert ("resumed" in codes(report)) != ("not-resumed" in codes(report))
        reused.append(report.bytes_reused)
        assert reshard.verify(OUT).num_tensors == report.num_tensors
        run.clear()
        after += step
    assert reused[0] == 0
    assert max(reused) > 20_000


@pytest.mark.slow
def test_killed_before_each_request(run: Run) -> None:
    """Parts that were sent and never became an object are ended by the next run."""
    after, left = 0, 0
    while run.killed(after, "request", resume=True):
        left += len(run.bucket.uploads())
        after += 1
        assert after < 60
    assert after > 10
    run.assert_whole()
    assert left


def test_all_is_reused_of_a_run_that_only_lacks_its_end(run: Run) -> None:
    assert run.killed(0, "commit")
    assert run.unfinished()
    report = run.convert(resume=True)
    run.assert_whole()
    assert report.bytes_reused == sum(t.nbytes for t in reshard.open(OUT).tensors.values())
    assert report.bytes_read == 0
    assert facts(report) == facts(run.expected)


def test_a_plain_run_removes_what_was_left(run: Run, bucket: Bucket) -> None:
    assert run.killed(50)
    begun = "out/model-00006-of-00006.safetensors"
    bucket.client.create_multipart_upload(Bucket=BUCKET, Key=begun)
    objects = len([name for name in bucket.names("out/") if "reshard." not in name])
    assert objects
    assert run.unfinished()
    report = run.convert()
    (found,) = [f for f in report.findings if f.code == "partial-output"]
    assert f"left {objects} files of" in found.message
    assert "seconds old" in found.message
    assert "uploads that were not ended" in found.message
    assert found.subject == OUT
    run.assert_whole()


@pytest.mark.parametrize(
    ("step", "resume"),
    [
        (12, True),
        pytest.param(1, True, marks=pytest.mark.slow),
        pytest.param(1, False, marks=pytest.mark.slow),
    ],
)
def test_killed_while_it_replaces_an_output(
    run: Run, bucket: Bucket, step: int, resume: bool
) -> None:
    """The old output stands, or nothing that anyone takes for one; and then the new one."""
    reshard.convert(run.at / "base", OUT)
    old = bucket.download("out")
    after, seen = 0, set()
    while run.killed(after, "request", overwrite=True):
        there = bucket.download("out")
        if "reshard.json" in there:
            kept = {name: data for name, data in there.items() if ".partial." not in name}
            assert kept in (old, run.whole)
            seen.add("old" if kept == old else "new")
        else:
            assert run.unfinished()
            seen.add("neither")
        run.convert(overwrite=True, resume=resume)
        run.assert_whole()
        reshard.convert(run.at / "base", OUT, overwrite=True)
        assert bucket.download("out") == old
        after += step
    # Twelve requests apart, no kill comes between reshard.json and the last request, which removes
    # what the run kept for itself.
    assert seen - {"new"} == {"old", "neither"}
    assert run.killed(0, "commit", overwrite=True)
    run.convert(resume=resume)  # there is nothing left to overwrite
    run.assert_whole()


def test_what_a_complete_output_keeps_by_accident(run: Run, bucket: Bucket) -> None:
    """A run that was killed after its last object: the rest is not read, and goes in the end."""
    assert run.killed(0, "commit")
    left = bucket.download("out")
    run.convert(resume=True)
    for name in ("reshard.partial.json", "reshard.partial.00001"):
        bucket.put(f"out/{name}", left[name])
    assert reshard.verify(OUT).num_tensors == run.expected.num_tensors
    with pytest.raises(reshard.WriteError, match="the output exists"):
        run.convert()
    run.convert(overwrite=True)
    run.assert_whole()
    bucket.put(CLAIM, left["reshard.partial.json"])
    made = reshard.convert(run.source, run.at / "again", base=OUT, allow_unchanged=True)
    assert not [name for name in made.copied if "partial" in name]


def test_objects_that_are_others_by_now(run: Run, bucket: Bucket) -> None:
    """One that was replaced is made again; one that is not what was noted is refused, and goes."""
    assert run.killed(0, "commit")
    file = "out/model-00003-of-00006.safetensors"
    good = bucket.get(file)
    bucket.put(file, good[:-1] + bytes([good[-1] ^ 1]))
    report = run.convert(resume=True)
    assert facts(report) == facts(run.expected)
    run.assert_whole()
    (found,) = [f for f in report.findings if f.code == "resumed"]
    assert "seconds ago" in found.message

    for at in (20, -1):  # in the header, which is compared, and in a tensor, which is hashed
        run.clear()
        assert run.killed(0, "commit")
        forge(bucket, file, at)
        with pytest.raises(reshard.WriteError, match="what an interrupted run left of it") as told:
            run.convert(resume=True)
        assert "Convert again with --resume" in str(told.value)
        assert file not in bucket.names("out")
        report = run.convert(resume=True)
        assert report.bytes_reused
        run.assert_whole()


def test_a_journal_that_is_damaged_or_of_another_run(run: Run, bucket: Bucket) -> None:
    def kill() -> list[str]:
        run.clear()
        assert run.killed(0, "commit")
        return bucket.names("out/reshard.partial.0")

    names = kill()
    assert len(names) > 3
    bucket.put(names[2], bucket.get(names[2])[:-3])
    report = run.convert(resume=True)
    assert report.bytes_reused
    assert "torn or damaged" in str(report)
    run.assert_whole()
    for damage, words in (("", "of another version"), (None, "nothing of it was finished")):
        for name in kill():
            if damage is None:
                bucket.client.delete_object(Bucket=BUCKET, Key=name)
            else:
                bucket.put(name, b"")
        report = run.convert(resume=True)
        assert not report.bytes_reused
        assert words in str(report)
        run.assert_whole()
    kill()
    report = run.convert(resume=True, max_shard_size=13000)
    assert "its plan is another" in str(report)
    assert not bucket.uploads()
    assert reshard.verify(OUT).num_tensors == report.num_tensors
    bucket.put(CLAIM, b"{}")
    bucket.client.delete_object(Bucket=BUCKET, Key="out/reshard.json")
    with pytest.raises(reshard.WriteError, match="not what reshard leaves") as told:
        run.convert()
    assert "Delete it" in str(told.value)
    bucket.client.delete_object(Bucket=BUCKET, Key=CLAIM)
    run.clear()
    run.convert()
    run.assert_whole()


def _claimed(bucket: Bucket, **changes: Any) -> None:
    """Change what the first object says."""
    stated = json.loads(bucket.get(CLAIM))
    bucket.put(CLAIM, json.dumps({**stated, **changes}).encode())


ELSEWHERE = Owner("other", "boot", "space", 7, "1")


def test_a_run_of_another_machine(
    run: Run, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This machine cannot know what became of it: its age says it, or the user."""
    assert run.killed(50)
    _claimed(bucket, owner=json.loads(msgspec.json.encode(ELSEWHERE)))
    before = bucket.download("out")
    cases: list[dict[str, Any]] = [{}, {"resume": True}, {"dry_run": True}]
    for more in cases:
        with pytest.raises(reshard.WriteError, match="process 7 on other writes") as told:
            run.convert(**more)
        assert "or convert again 20 minutes after its end" in str(told.value)
        assert bucket.download("out") == before
    with monkeypatch.context() as later:
        later.setattr(claims, "SILENT", 0.0)
        assert run.convert(resume=True).bytes_reused
    run.assert_whole()
    run.clear()
    for name, data in before.items():
        bucket.put(f"out/{name}", data)
    run.convert(overwrite=True)  # the user says that it runs no more
    run.assert_whole()


def test_what_is_someone_elses_stays(run: Run, bucket: Bucket) -> None:
    assert run.killed(50)
    bucket.put("out/mine.txt", b"mine")
    before = bucket.download("out")
    cases: list[dict[str, Any]] = [{}, {"resume": True}, {"overwrite": True}]
    for more in cases:
        with pytest.raises(reshard.WriteError, match=r"mine\.txt") as told:
            run.convert(**more)
        assert "move away what is yours" in str(told.value)
        assert bucket.download("out") == before
    bucket.client.delete_object(Bucket=BUCKET, Key="out/mine.txt")
    run.convert(resume=True)
    run.assert_whole()


def test_an_interrupt_keeps_what_is_finished(run: Run, bucket: Bucket) -> None:
    """With --resume; the message says so, and any machine may go on at once."""

    def stop(what: str, done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.convert(resume=True, progress=stop)
    assert run.unfinished()
    assert not bucket.uploads()
    _claimed(bucket, owner=json.loads(msgspec.json.encode(ELSEWHERE)))
    words = ["convert", str(run.source), OUT, "--base", str(run.at / "base"), "--resume"]
    words += ["--max-shard-size", "7000", "--threads", "1"]
    done = CliRunner().invoke(command, words)
    assert done.exit_code == 0, done.output
    assert "was continued" in " ".join(done.output.split())
    run.assert_whole()


def test_a_store_that_fails_keeps_what_is_finished(run: Run, bucket: Bucket) -> None:
    def refuse(request: Request) -> Fault:
        return 403 if request.method == "PUT" and "00005-of" in request.path else None

    for resume in (True, False):
        bucket.proxy.fault = refuse
        with pytest.raises(reshard.WriteError, match="403") as told:
            run.convert(resume=resume)
        bucket.proxy.fault = lambda request: None
        assert not bucket.uploads()
        assert bool(bucket.names("out")) == resume
        assert ("pass --resume to continue" in str(told.value)) == resume
        if resume:
            assert run.convert(resume=True).bytes_reused
            run.assert_whole()
            run.clear()


def test_a_run_gives_signs_of_life_and_notices_another(
    run: Run, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "BEAT", 0.05)
    seen: set[bytes] = set()

    def wait(what: str, done: int, total: int) -> None:
        seen.add(bucket.client.head_object(Bucket=BUCKET, Key=CLAIM)["LastModified"])

    run.convert(progress=wait)
    run.assert_whole()
    signs = [r for r in bucket.proxy.seen if r.method == "PUT" and r.path.endswith("partial.json")]
    assert len(signs) > 1
    assert all("if-match" in {n.lower() for n in r.headers} for r in signs[1:])
    run.clear()

    def take(what: str, done: int, total: int) -> None:
        bucket.put(CLAIM, b"{}")

    with pytest.raises(reshard.WriteError, match="another run writes this output"):
        run.convert(progress=take)
    assert "out/reshard.json" not in bucket.names("out")


def test_uploads_that_cannot_be_looked_for(
    run: Run, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without keys, as those of a machine's role: it is said, and nothing else fails."""
    assert run.killed(50)
    begun = "out/model-00006-of-00006.safetensors"
    number = bucket.client.create_multipart_upload(Bucket=BUCKET, Key=begun)["UploadId"]
    monkeypatch.setattr(uploads, "_ask", lambda *given: None)
    report = run.convert()
    assert "cannot be looked for here" in str(report)
    assert bucket.download("out") == run.whole
    assert begun in bucket.uploads()
    bucket.client.abort_multipart_upload(Bucket=BUCKET, Key=begun, UploadId=number)


def test_uploads_of_others_are_not_ended(run: Run, bucket: Bucket) -> None:
    names = ["out/mine", "out2/model-00001-of-00006.safetensors"]
    made = [bucket.client.create_multipart_upload(Bucket=BUCKET, Key=n)["UploadId"] for n in names]
    assert run.killed(50)
    run.convert()
    assert sorted(bucket.uploads()) == names
    target = located(OUT)
    assert uploads.begun(target, ["mine"]) == [uploads.Begun("out/mine", made[0])]  # type: ignore[arg-type]
    for name, number in zip(names, made, strict=True):
        bucket.client.abort_multipart_upload(Bucket=BUCKET, Key=name, UploadId=number)
    assert os.environ["AWS_ACCESS_KEY_ID"] not in "".join(r.path for r in bucket.proxy.seen)
