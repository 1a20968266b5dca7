"""Checkpoints that workers read from object stores, and outputs that they send there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import reshard
from reshard.transfer.cluster import executor, stores
from tests.cluster import nodes
from tests.cluster.test_ray import save
from tests.files import contents
from tests.golden.table import CONVERSIONS, GOLDEN, HERE
from tests.remote.conftest import bucket, moto
from tests.remote.server import BUCKET, KEYS, Bucket, Fault, Proxy, Request
from tests.remote.store_runs import OUT, Meanwhile, forge

ray = pytest.importorskip("ray")
pytest.importorskip("obstore")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds workers in /proc"),
]
__all__ = ["bucket", "moto"]


@pytest.fixture(scope="module")
def cluster(moto: Proxy) -> Iterator[Any]:
    """Three nodes, which have the settings of the store."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings(moto).items():
            patch.setenv(name, value)
        with nodes.cluster(3) as made:
            ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
            yield made
            ray.shutdown()


def settings(moto: Proxy) -> dict[str, str]:
    """The environment that leads to the store."""
    return {
        **KEYS,
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{moto.port}",
    }


def left(bucket: Bucket) -> list[str]:
    return [*bucket.names("out"), *bucket.uploads()]


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """48 MiB of bfloat16, in files of 8: uploads in parts."""
    return save(tmp_path / "run", layers=24)


OPTIONS: dict[str, Any] = {"dtype": "bfloat16", "max_shard_size": "9MB"}


def test_golden_checkpoints_from_and_into_a_store(
    cluster: Any, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same files as on the disk; small tasks, and pieces that lie in several files."""
    monkeypatch.setattr(executor, "TASK_NBYTES", 2 << 10)
    spanning = 0
    own = stores._Sending.own

    def counted(self: Any, piece: Any) -> list[int]:
        nonlocal spanning
        found = own(self, piece)
        spanning += len(found) < len(piece.segments)
        return found

    monkeypatch.setattr(stores._Sending, "own", counted)
    for name in GOLDEN:
        url = bucket.upload(HERE / name / "checkpoint", f"runs/{name}")
        cases = {**CONVERSIONS, "small files": {"to": "dcp", "max_shard_size": 3000}}
        for what, options in cases.items():
            target = f"s3://{BUCKET}/out/{name}/{what.replace(' ', '-')}"
            local = reshard.convert(HERE / name / "checkpoint", tmp_path / name / what, **options)
            report = reshard.convert(url, target, engine="ray", **options)
            assert report.verified
            key = target.removeprefix(f"s3://{BUCKET}/")
            assert bucket.download(key) == contents(tmp_path / name / what)
            assert report.requests is not None
            assert report.requests.put > len(local.files)
            assert report.requests.bytes_written >= local.bytes_written
            # What two files need of a piece is read for each.
            apart = ("seconds", "target", "source", "checkpoint", "findings", "requests",
                     "bytes_read")  # fmt: skip
            assert report.bytes_read >= local.bytes_read
            assert {k: v for k, v in report.to_json().items() if k not in apart} == {
                k: v for k, v in local.to_json().items() if k not in apart
            }
    assert spanning
    assert not bucket.uploads()


def test_every_request_of_the_workers_is_counted(
    cluster: Any, bucket: Bucket, trained: Path
) -> None:
    report = reshard.convert(trained, OUT, engine="ray", **OPTIONS)
    seen = bucket.proxy
    deletions = sum("?delete" in request.path for request in seen.seen)
    assert report.requests is not None
    assert report.requests.put == seen.count("PUT") + seen.count("POST") - deletions
    assert report.requests.bytes_read >= report.bytes_written  # read back by the workers


def test_workers_that_are_lost(cluster: Any, bucket: Bucket, trained: Path, tmp_path: Path) -> None:
    """Killed while they send: others make their files, and their uploads are ended."""
    reshard.convert(trained, tmp_path / "local", **OPTIONS)
    killed: list[int] = []

    def kill(request: Request) -> Fault:
        if "partNumber=" in request.path and len(killed) < 2:
            killed.append(1)
            nodes.kill(nodes.at_work())
        return None

    bucket.proxy.fault = kill
    report = reshard.convert(trained, OUT, engine="ray", **OPTIONS)
    assert "pieces-made-again" in [finding.code for finding in report.findings]
    assert bucket.download("out") == contents(tmp_path / "local")
    assert not bucket.uploads()


def test_a_failure_leaves_nothing(cluster: Any, bucket: Bucket, trained: Path) -> None:
    """Of a worker's write, of the values, and where the user interrupts."""

    def refuse(request: Request) -> Fault:
        return 403 if "00004-of" in request.path and request.method == "PUT" else None

    bucket.proxy.fault = refuse
    with pytest.raises(reshard.WriteError, match="403 Forbidden"):
        reshard.convert(trained, OUT, engine="ray", **OPTIONS)
    bucket.proxy.fault = lambda request: None
    assert not left(bucket)

    def interrupt(stage: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reshard.convert(trained, OUT, engine="ray", progress=interrupt, **OPTIONS)
    assert not left(bucket)
    save_file({"w": np.array([1e30], np.float32)}, trained / "model.safetensors")
    with pytest.raises(reshard.VerificationError, match="1e\\+30"):
        reshard.convert(trained, OUT, engine="ray", dtype="float16")
    assert not left(bucket)


@pytest.mark.parametrize(("first", "second"), [("ray", "ray"), ("local", "ray"), ("ray", "local")])
def test_an_interrupted_run_is_continued(
    cluster: Any, bucket: Bucket, trained: Path, tmp_path: Path, first: Any, second: Any
) -> None:
    """By either engine; a file that is not what was noted is made again by a worker."""
    reshard.convert(trained, tmp_path / "local", **OPTIONS)

    def interrupt(stage: str, done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reshard.convert(trained, OUT, engine=first, resume=True, progress=interrupt, **OPTIONS)
    assert not bucket.uploads()
    files = [name for name in bucket.names("out/") if name.endswith(".safetensors")]
    assert files
    if second == "ray":
        forge(bucket, files[0], -1)
    report = reshard.convert(trained, OUT, engine=second, resume=True, **OPTIONS)
    assert bucket.download("out") == contents(tmp_path / "local")
    (found,) = [f for f in report.findings if f.code == "resumed"]
    assert ("pieces made again" in found.message) == (second == "ray")
    assert report.bytes_reused
    assert report.bytes_reused <= len(files) * (8 << 20)
    assert not bucket.uploads()


def test_two_commands_of_one_output(cluster: Any, bucket: Bucket, trained: Path) -> None:
    second = Meanwhile(lambda: reshard.convert(trained, OUT, **OPTIONS))
    reshard.convert(trained, OUT, engine="ray", progress=second, **OPTIONS)
    (refusal,) = second.refusals
    assert "is writing this output" in refusal
    assert json.loads(bucket.get("out/reshard.json"))["tensors"]
