"""Outputs in stores: the same bytes as locally, complete with the last object or not there."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

import reshard
from reshard.cli.app import reshard as command
from reshard.containers.dcp import layout
from reshard.core import digests
from reshard.core.locations import located
from reshard.transfer import upload
from reshard.transfer.remote import RemoteFolder
from tests.budget import _ENVIRONMENT, MEMORY, needs_proc, peak
from tests.files import contents
from tests.remote.server import BUCKET, KEYS, Bucket, Fault, Request, slowly
from tests.remote.store_runs import OUT, Meanwhile
from tests.remote.test_reading import CHECKPOINTS, GOLDEN


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """28 MB in tensors of up to 12 MB: uploads in several parts, and small files."""
    folder = tmp_path / "trained"
    folder.mkdir()
    rng = np.random.default_rng(0)
    sizes = [3 << 20, 1000, 7, 3 << 20, 100_000, 1 << 20]
    tensors = {f"w{n}": rng.random(size, np.float32) for n, size in enumerate(sizes)}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "x"}')
    return folder


def left(bucket: Bucket) -> list[str]:
    """What is there of an output, begun uploads included."""
    return [*bucket.names("out"), *bucket.uploads()]


@pytest.mark.parametrize(
    "options",
    [{"dtype": "bfloat16", "max_shard_size": "9MB"}, {"to": "dcp", "max_shard_size": "20MB"}],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_the_same_bytes_as_locally(
    bucket: Bucket, trained: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    reshard.convert(trained, tmp_path / "local", **options)
    expected = contents(tmp_path / "local")
    report = reshard.convert(trained, OUT, threads=3, **options)
    assert bucket.download("out") == expected
    assert report.verified
    assert report.target == OUT
    assert report.requests is not None
    # Verification read all of it from the store.
    assert report.requests.bytes_read >= report.bytes_written
    assert report.requests.bytes_written >= report.bytes_written
    deletions = sum("?delete" in request.path for request in bucket.proxy.seen)
    writes = bucket.proxy.count("PUT") + bucket.proxy.count("POST") - deletions
    assert (report.requests.put, report.requests.delete) == (writes, deletions)
    assert not bucket.uploads()
    again = f"s3://{BUCKET}/again"
    source = bucket.upload(trained, "m")
    reshard.convert(source, again, verify=False, **options)
    assert bucket.download("again") == expected
    assert reshard.verify(again, trained).num_tensors == 6


def test_threads_that_are_ahead_wait_and_never_for_ever(
    bucket: Bucket, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leaves that cross chunks, with a CRC-32 between two chunks, and little room ahead."""
    monkeypatch.setattr(digests, "LEAF_NBYTES", 1 << 20)
    monkeypatch.setattr(layout, "MAX_CHUNK_NBYTES", 800_000)
    monkeypatch.setattr(upload, "_AHEAD", 1 << 16)
    monkeypatch.setattr(upload, "_READY", 1 << 16)
    for threads in (1, 4):
        out = f"{OUT}{threads}"
        reshard.convert(trained, out, to="dcp", threads=threads, verify=False)
    reshard.convert(trained, tmp_path / "local", to="dcp", verify=False)
    for threads in (1, 4):
        assert bucket.download(f"out{threads}") == contents(tmp_path / "local")


@pytest.mark.slow
@needs_proc
def test_memory_from_store_to_store(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the budget of every command: 192 MiB of weights are never held whole."""
    folder = tmp_path / "large"
    folder.mkdir()
    one = np.random.default_rng(0).random(4 << 20, np.float32)
    save_file({f"w{n}": one for n in range(12)}, folder / "model.safetensors")
    for name in (*KEYS, "AWS_REGION", "AWS_ENDPOINT_URL"):
        monkeypatch.setitem(_ENVIRONMENT, name, os.environ[name])
    url = bucket.upload(folder, "large")
    code = "import reshard; reshard.convert(sys.argv[1], sys.argv[2], threads=4)"
    assert peak(code, url, OUT) < MEMORY
    assert peak(code, folder, tmp_path / "local") < MEMORY


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints_into_a_store(bucket: Bucket, tmp_path: Path, name: str) -> None:
    run = GOLDEN / name / "checkpoint"
    for to in ("hf", "dcp"):
        reshard.convert(run, tmp_path / to, to=to)
        assert reshard.convert(run, f"s3://{BUCKET}/{to}", to=to).verified
        assert bucket.download(to) == contents(tmp_path / to)


def test_the_command_says_where_it_wrote(bucket: Bucket, model: Path) -> None:
    words = ["convert", str(model), OUT, "--dtype", "float16"]
    dry = CliRunner().invoke(command, [*words, "--dry-run"])
    assert dry.exit_code == 0, dry.output
    assert not left(bucket)
    done = CliRunner().invoke(command, [*words, "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["target"] == OUT
    assert report["requests"]["put"] >= 4
    told = done.output + bucket.get("out/reshard.json").decode()
    for secret in KEYS.values():
        assert secret not in told
    with pytest.raises(reshard.OptionError, match="only be read"):
        reshard.convert(model, "hf://org/name")
    with pytest.raises(reshard.OptionError, match="only be read"):
        reshard.convert(model, "https://host/out")


def fails(bucket: Bucket, source: Any, match: str, **options: Any) -> reshard.ReshardError:
    """A conversion that fails, and leaves nothing."""
    with pytest.raises(reshard.ReshardError, match=match) as told:
        reshard.convert(source, OUT, **options)
    bucket.proxy.fault = lambda request: None
    assert not left(bucket)
    for secret in KEYS.values():
        assert secret not in str(told.value)
    return told.value


@pytest.mark.parametrize("what", ["partNumber=2", "uploadId", "config.json", "reshard.json"])
def test_a_store_that_refuses_a_write(bucket: Bucket, trained: Path, what: str) -> None:
    def refuse(request: Request) -> Fault:
        return 403 if request.method in ("PUT", "POST") and what in request.path else None

    bucket.proxy.fault = refuse
    error = fails(bucket, trained, "403 Forbidden")
    assert isinstance(error, reshard.WriteError)
    assert OUT in str(error)


@pytest.mark.parametrize("fault", [503, "drop", "slow", "done", "gone"])
def test_writes_that_fail_once(
    bucket: Bucket, trained: Path, tmp_path: Path, fault: int | str
) -> None:
    """Each of them: a part, the end of an upload, a small file, the first and the last object.

    A store may have done what it answered with an error, or did not answer.
    """
    reshard.convert(trained, tmp_path / "local")
    struck: set[str] = set()

    def once(request: Request) -> Fault:
        if request.method not in ("PUT", "POST") or "?delete" in request.path:
            return None
        # Google's and Amazon's clients do not repeat what begins an upload when nobody answers.
        if request.path in struck or (fault in ("drop", "gone") and "?uploads" in request.path):
            return None
        struck.add(request.path)
        return slowly(0.05) if fault == "slow" else fault

    bucket.proxy.fault = once
    assert reshard.convert(trained, OUT).verified
    assert len(struck) >= 6
    assert bucket.download("out") == contents(tmp_path / "local")
    # What began without its number being told stays, as that of a run that was killed.
    assert not bucket.uploads() or fault == "done"


def test_an_end_that_failed_with_other_bytes(bucket: Bucket, trained: Path) -> None:
    """An object of the same size may still hold other bytes than those sent."""
    name = "out/model.safetensors"
    nbytes = (trained / "model.safetensors").stat().st_size

    def replaced(request: Request) -> Fault:
        if request.method == "POST" and "uploadId=" in request.path:
            bucket.put(name, bytes(nbytes))
            return 403
        return None

    bucket.proxy.fault = replaced
    fails(bucket, trained, "403 Forbidden", dtype="keep", verify=False)


def test_a_source_that_changes_leaves_nothing(bucket: Bucket, trained: Path) -> None:
    url = bucket.upload(trained, "m")

    def change(what: str, done: int, total: int) -> None:
        if what == "write" and done == total:
            bucket.put("m/model.safetensors", bucket.get("m/model.safetensors") + b"!")

    fails(bucket, url, "changed while it was read", progress=change)


def test_an_interrupt_leaves_nothing(bucket: Bucket, trained: Path) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if done > 20 << 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reshard.convert(trained, OUT, progress=stop, threads=4)
    assert not left(bucket)


def test_what_is_read_back_is_what_is_there(bucket: Bucket, trained: Path) -> None:
    """An object that is not what was sent: verification finds it, and nothing is left."""

    def spoil(what: str, done: int, total: int) -> None:
        if what == "verify" and not spoilt:
            spoilt.append(1)
            data = bytearray(bucket.get("out/model.safetensors"))
            data[-5] ^= 1
            bucket.put("out/model.safetensors", bytes(data))

    spoilt: list[int] = []
    error = fails(bucket, trained, "", progress=spoil, threads=1)
    assert isinstance(error, (reshard.VerificationError, reshard.IncompleteError))


def test_overwriting(bucket: Bucket, trained: Path, model: Path, tmp_path: Path) -> None:
    reshard.convert(trained, OUT, max_shard_size="9MB")
    before = bucket.names("out")
    with pytest.raises(reshard.WriteError, match="the output exists: reshard wrote it"):
        reshard.convert(model, OUT)
    reshard.convert(model, tmp_path / "local")
    report = reshard.convert(model, OUT, overwrite=True)
    assert bucket.download("out") == contents(tmp_path / "local")
    assert report.replaced is not None
    assert report.replaced.num_files == len(before)
    # What reshard did not write, or what was changed, is kept.
    bucket.put("out/mine.txt", b"mine")
    with pytest.raises(reshard.WriteError, match=r"mine\.txt"):
        reshard.convert(model, OUT, overwrite=True)
    bucket.client.delete_object(Bucket=BUCKET, Key="out/mine.txt")
    bucket.put("out/config.json", b'{"model_type": "y", "torch_dtype": "bfloat16"}')
    with pytest.raises(reshard.WriteError, match=r"config.json \(changed\)"):
        reshard.convert(model, OUT, overwrite=True)
    bucket.put("other/config.json", b"{}")
    with pytest.raises(reshard.WriteError, match="not an output of reshard"):
        reshard.convert(model, f"s3://{BUCKET}/other", overwrite=True)
    with pytest.raises(reshard.WriteError, match="is a file"):
        reshard.convert(model, f"{OUT}/config.json")
    assert bucket.get("other/config.json") == b"{}"


def test_the_old_output_stands_until_the_new_is_sent(
    bucket: Bucket, trained: Path, model: Path
) -> None:
    reshard.convert(model, OUT)
    before = bucket.download("out")
    bucket.proxy.fault = lambda request: 403 if "?uploads" in request.path else None
    with pytest.raises(reshard.WriteError, match="403") as told:
        reshard.convert(trained, OUT, overwrite=True)
    assert bucket.download("out") == before
    assert "deleted" not in str(told.value)
    bucket.proxy.fault = lambda request: 403 if request.path.endswith("out/config.json") and (
        request.method == "PUT"
    ) else None  # fmt: skip
    fails(bucket, trained, "The old output is deleted", overwrite=True)


def test_two_runs_of_one_output(bucket: Bucket, trained: Path, tmp_path: Path) -> None:
    reshard.convert(trained, tmp_path / "local")
    folder = RemoteFolder(located(OUT), "plan", [])  # type: ignore[arg-type]
    second = Meanwhile(folder.__enter__)
    reshard.convert(trained, OUT, progress=second)
    (refusal,) = second.refusals
    assert re.match(rf"{OUT}: process {os.getpid()} on .* is writing this output", refusal)
    assert bucket.download("out") == contents(tmp_path / "local")


@pytest.mark.parametrize("what", ["config.json", "mine.txt", "reshard.partial.json"])
def test_somebody_else_writes_there(bucket: Bucket, trained: Path, what: str) -> None:
    def write(stage: str, done: int, total: int) -> None:
        if stage == "verify" and done == total:
            bucket.put(f"out/{what}", b"{}")

    with pytest.raises(reshard.WriteError, match=r"something else|another run"):
        reshard.convert(trained, OUT, progress=write)
    names = bucket.names("out")
    assert "out/reshard.json" not in names
    # Taken over by another run: all of it is the other's.
    assert (
        names
        == {
            "config.json": [],
            "mine.txt": ["out/mine.txt"],
            "reshard.partial.json": ["out/config.json", "out/model.safetensors", f"out/{what}"],
        }[what]
    )
