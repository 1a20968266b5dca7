"""Checkpoints and bases in stores: read as local ones, by ranges, and proven to be whole."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

import reshard
from reshard.cli.app import reshard as command
from reshard.core.locations import RemotePath
from reshard.storage import credentials
from reshard.storage.local import Sources
from reshard.transfer import claims, upload
from tests.files import contents
from tests.remote.server import BUCKET, KEYS, Bucket, Fault, Request, slowly

GOLDEN = Path(__file__).parents[1] / "golden"


CHECKPOINTS = [path.parent.name for path in sorted(GOLDEN.glob("*/checkpoint"))]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_in_a_store_gives_the_same_bytes(
    bucket: Bucket, tmp_path: Path, name: str
) -> None:
    local = GOLDEN / name / "checkpoint"
    url = bucket.upload(local, f"runs/{name}")
    reshard.convert(local, tmp_path / "local")
    report = reshard.convert(url, tmp_path / "remote")
    assert contents(tmp_path / "remote") == contents(tmp_path / "local")
    assert report.verified
    assert report.requests is not None
    # Every file is read by one request, but for those that are not needed: they are small.
    files = [path for path in local.rglob("*") if path.is_file()]
    assert report.requests.get <= len(files)
    assert report.requests.get + report.requests.list + report.requests.head == len(
        bucket.proxy.seen
    )
    assert report.to_json()["requests"]["bytes_read"] == report.requests.bytes_read > 0
    assert "to stores" in str(report)


def test_every_command_takes_a_url(bucket: Bucket, model: Path, tmp_path: Path) -> None:
    reshard.convert(model, tmp_path / "out", dtype="keep")
    url = bucket.upload(model, "m")
    out = bucket.upload(tmp_path / "out", "out")
    other = bucket.upload(model, "other")
    made = reshard.convert(model, tmp_path / "based", base=url, allow_unchanged=True)
    assert made.verified
    reshard.convert(model, tmp_path / "plain", base=model, allow_unchanged=True)
    assert contents(tmp_path / "based") == contents(tmp_path / "plain")
    assert reshard.verify(out).num_tensors == 2
    assert reshard.verify(tmp_path / "out", url).num_tensors == 2
    assert reshard.diff(url, model).same
    found = [finding.code for finding in reshard.doctor(url, base=other).findings]
    assert found == [finding.code for finding in reshard.doctor(model, base=other).findings]
    for words in (["inspect", url, "--base", url, "--json"], ["verify", out], ["diff", url, out]):
        result = CliRunner().invoke(command, words)
        assert result.exit_code == 0, result.output
    shown = json.loads(CliRunner().invoke(command, ["inspect", url, "--json"]).stdout)
    expected = json.loads(CliRunner().invoke(command, ["inspect", str(model), "--json"]).stdout)
    assert shown["path"] == url
    assert {**shown, "path": "", "requests": None} == {**expected, "path": ""}
    for words in (["inspect", url], ["verify", out], ["diff", url, out], ["doctor", out]):
        bucket.proxy.seen.clear()
        result = CliRunner().invoke(command, words)
        assert f"requests: {len(bucket.proxy.seen)} to stores (" in result.stderr, words
        stated = json.loads(CliRunner().invoke(command, [*words, "--json"]).stdout)["requests"]
        assert stated["get"] + stated["list"] + stated["head"] > 0
        assert "requests" not in CliRunner().invoke(command, [*words, "--json"]).stderr
    one = reshard.open(f"{url}/model-00001-of-00002.safetensors")
    there = reshard.open(model).tensors["w8"].numpy()
    assert np.array_equal(one.tensors["w8"].numpy(), there)


def test_neighbours_are_read_at_once(bucket: Bucket, tmp_path: Path) -> None:
    """300 small tensors and a large one: the bytes that are needed, in few requests."""
    folder = tmp_path / "many"
    folder.mkdir()
    tensors = {f"{n:03d}": np.full(4096, n, np.float32) for n in range(300)}
    save_file({**tensors, "x": np.ones(4 << 20, np.float32)}, folder / "model.safetensors")
    url = bucket.upload(folder, "many")
    reshard.convert(folder, tmp_path / "local", dtype="bfloat16")
    report = reshard.convert(url, tmp_path / "remote", dtype="bfloat16")
    assert contents(tmp_path / "remote") == contents(tmp_path / "local")
    assert report.requests is not None
    nbytes = (folder / "model.safetensors").stat().st_size
    assert report.requests.get <= 24
    assert nbytes <= report.requests.bytes_read <= nbytes + (1 << 20)


@pytest.mark.parametrize("fault", [500, 503, "cut", "slow"])
def test_faults_that_pass(bucket: Bucket, model: Path, tmp_path: Path, fault: int | str) -> None:
    url = bucket.upload(model, "m")
    reshard.convert(model, tmp_path / "local")
    struck: set[str] = set()

    def once(request: Request) -> Fault:
        key = request.path
        if request.method != "GET" or key in struck or (fault == "cut" and "list" in key):
            return None
        struck.add(key)
        return slowly(0.05) if fault == "slow" else fault

    bucket.proxy.fault = once
    reshard.convert(url, tmp_path / "remote")
    assert struck
    assert contents(tmp_path / "remote") == contents(tmp_path / "local")


def reads(fault: Fault) -> Callable[[Request], Fault]:
    """A fault of every read of a range."""
    return lambda request: fault if "range" in request.headers else None


def test_a_store_that_stays_broken(
    bucket: Bucket, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reshard.storage import stores

    monkeypatch.setitem(stores.RETRY, "max_retries", 1)
    monkeypatch.setattr(stores, "_TRIES", 2)
    monkeypatch.setenv("AWS_SESSION_TOKEN", "another")  # opens the bucket anew
    url = bucket.upload(model, "m")
    for fault, words in ((500, "500 Internal Server Error"), ("cut", "")):
        bucket.proxy.fault = reads(fault)
        with pytest.raises(reshard.IncompleteError, match="it cannot be read") as told:
            reshard.convert(url, tmp_path / "out")
        assert words in str(told.value)
        assert url in str(told.value)
        for secret in (*KEYS.values(), "another"):
            assert secret not in str(told.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("when", ["during", "after"])
def test_an_object_that_changes_in_the_middle(
    bucket: Bucket, model: Path, tmp_path: Path, when: str
) -> None:
    url = bucket.upload(model, "m")
    name = "m/model-00001-of-00002.safetensors"
    looked = 0

    def change(request: Request) -> Fault:
        nonlocal looked
        if name in request.path and "range" in request.headers:
            looked += 1
            if looked == 1 and when == "during":
                bucket.put(name, bucket.get(name)[:-1] + b"!")
        return None

    def progress(what: str, done: int, total: int) -> None:
        if when == "after" and what == "write" and done == total:  # what was read was the old one
            bucket.put(name, bucket.get(name)[:-1] + b"!")

    bucket.proxy.fault = change
    with pytest.raises(reshard.IncompleteError, match="changed while it was read") as told:
        reshard.convert(url, tmp_path / "out", progress=progress)
    assert "model-00001-of-00002.safetensors" in str(told.value)
    assert not (tmp_path / "out").exists()


def test_what_is_not_there(bucket: Bucket, model: Path, tmp_path: Path) -> None:
    url = bucket.upload(model, "m")
    for wrong, words in (
        (f"s3://{BUCKET}/nothing", "no such file or folder"),
        ("s3://no-such-bucket/m", "bucket does not exist"),
        (f"{url}/config.json", "."),
    ):
        with pytest.raises(reshard.ReshardError, match=words) as told:
            reshard.convert(wrong, tmp_path / "out")
        assert wrong in str(told.value)
    with pytest.raises(reshard.NotFoundError):
        reshard.convert(model, tmp_path / "out", base=f"s3://{BUCKET}/nothing")
    assert not (tmp_path / "out").exists()


def test_refusals_name_the_settings_and_no_secrets(
    bucket: Bucket, model: Path, tmp_path: Path
) -> None:
    url = bucket.upload(model, "m")
    bucket.proxy.fault = lambda request: 403
    with pytest.raises(reshard.NotFoundError, match="403 Forbidden") as told:
        reshard.open(url)
    assert told.value.hint == (
        "Check the store's own settings: its keys, region and endpoint (docs/remote.md)."
    )
    # Its keys are those of the environment, whatever else there is.
    sent = " ".join(bucket.proxy.seen[-1].headers.values())
    assert KEYS["AWS_ACCESS_KEY_ID"] in sent
    for secret in KEYS.values():
        assert secret not in str(told.value)
    bucket.proxy.fault = lambda request: None  # the mend
    assert reshard.open(url).format == "huggingface"


def test_the_files_of_the_aws_tools(
    bucket: Bucket, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = bucket.upload(model, "m")
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    for name in (*KEYS, "AWS_REGION", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    (tmp_path / "credentials").write_text(
        "[mine]\naws_access_key_id = of-the-file\naws_secret_access_key = x\n"
    )
    (tmp_path / "config").write_text(
        f"[profile mine]\nregion = eu-west-1\nendpoint_url = {endpoint}\n"
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "mine")
    assert reshard.open(url).format == "huggingface"
    assert "of-the-file/" in bucket.proxy.seen[-1].headers["authorization"]
    assert "/eu-west-1/" in bucket.proxy.seen[-1].headers["authorization"]
    monkeypatch.delenv("AWS_PROFILE")
    assert credentials.aws() == {"region": "us-east-1"}


def _private_key() -> str:
    """A key, which the client wants to see although it signs nothing here."""
    rsa = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.rsa")
    from cryptography.hazmat.primitives import serialization

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    text: bytes = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return text.decode()


def test_google_cloud_storage(
    bucket: Bucket, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its XML protocol is that of S3, so far as it is used here, but for conditions of writes."""
    bucket.upload(model, "m")
    account = {
        "type": "service_account",
        "gcs_base_url": os.environ["AWS_ENDPOINT_URL"],
        "disable_oauth": True,
        "client_email": "",
        "private_key": _private_key(),
        "private_key_id": "",
    }
    (tmp_path / "account.json").write_text(json.dumps(account))
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(tmp_path / "account.json"))
    reshard.convert(model, tmp_path / "local", max_shard_size="100KB")
    reshard.convert(f"gs://{BUCKET}/m", tmp_path / "remote", max_shard_size="100KB")
    assert contents(tmp_path / "remote") == contents(tmp_path / "local")
    monkeypatch.setattr(upload, "_SMALL", 1000)  # in parts
    monkeypatch.setattr(claims, "BEAT", 0.02)
    out = f"gs://{BUCKET}/out"

    def stop(what: str, done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reshard.convert(model, out, resume=True, progress=stop, threads=1, max_shard_size="100KB")
    assert reshard.convert(model, out, resume=True, max_shard_size="100KB").bytes_reused
    assert bucket.download("out") == contents(tmp_path / "local")
    with pytest.raises(reshard.WriteError, match="exists"):
        reshard.convert(model, out)
    reshard.convert(model, out, dtype="bfloat16", overwrite=True)
    assert bucket.download("out") != contents(tmp_path / "local")
    assert reshard.verify(out).num_tensors == 2
    conditions = [r for r in bucket.proxy.seen if "x-goog-if-generation-match" in r.headers]
    assert len(conditions) >= 6


def test_an_output_that_is_not_complete(bucket: Bucket, model: Path, tmp_path: Path) -> None:
    reshard.convert(model, tmp_path / "out")
    url = bucket.upload(tmp_path / "out", "out")
    manifest = bucket.get("out/reshard.json")
    bucket.client.delete_object(Bucket=BUCKET, Key="out/reshard.json")
    bucket.put("out/reshard.partial.json", b"{}")
    for call in (
        reshard.open,
        reshard.verify,
        reshard.doctor,
        lambda path: reshard.diff(model, path),
        lambda path: reshard.convert(path, tmp_path / "again"),
        lambda path: reshard.convert(model, tmp_path / "again", base=path),
    ):
        with pytest.raises(reshard.IncompleteError, match="not complete"):
            call(url)
    bucket.put("out/reshard.json", manifest)  # the run that wrote it goes on
    assert reshard.verify(url).num_tensors == 2


def test_without_the_extra(bucket: Bucket, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = bucket.upload(model, "m")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "of-this-test")  # opens the bucket anew
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "obstore.store", None)
        patch.setitem(sys.modules, "obstore", None)
        with pytest.raises(reshard.UnsupportedError, match="obstore, which is not installed"):
            reshard.open(url)
        assert reshard.open(model).format == "huggingface"
    assert reshard.open(url).format == "huggingface"


def test_a_remote_path_is_read_by_its_door_alone() -> None:
    path = RemotePath("s3:", BUCKET, "a", "b.json")
    assert str(path) == f"s3://{BUCKET}/a/b.json"
    assert str(path.parent / "c") == f"s3://{BUCKET}/a/c"
    assert path.relative_to(path.parents[1]).as_posix() == "a/b.json"
    assert (path.scheme, path.bucket, path.key) == ("s3", BUCKET, "a/b.json")
    with pytest.raises(OSError, match="object of a store"):
        path.exists()
    with pytest.raises(OSError, match="object of a store"):
        path.mkdir()


def test_a_store_that_takes_long_holds_up_no_other_file(bucket: Bucket, model: Path) -> None:
    url = bucket.upload(model, "m")
    asked, answered = threading.Event(), threading.Event()

    def wait(request: Request) -> Fault:
        asked.set()
        return lambda: answered.wait(20)

    bucket.proxy.fault = wait
    with Sources() as sources:
        thread = threading.Thread(target=sources.open, args=(f"{url}/config.json",))
        thread.start()
        assert asked.wait(20)
        assert sources.open(model / "config.json").read(0, 1) == b"{"
        assert thread.is_alive()
        answered.set()
        thread.join()
        assert sources.open(f"{url}/config.json").read(0, 1) == b"{"


def test_a_local_path_never_opens_a_store(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from reshard.storage import remote

    monkeypatch.setattr(remote, "_view", None)
    with Sources() as sources:
        assert sources.open(model / "config.json").read(0, 1) == b"{"
        sources.check_unchanged()
    assert reshard.inspect(model).num_tensors == 2
