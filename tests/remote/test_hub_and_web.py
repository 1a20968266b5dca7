"""Models of the Hugging Face hub and of web servers, and URLs that are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import reshard
from reshard.cli.app import reshard as command
from tests.files import contents
from tests.remote.server import BUCKET, Bucket, serving
from tests.remote.web import COMMIT, Hub, web


def test_a_model_of_the_hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("obstore")
    reshard.convert(model, tmp_path / "local")
    with web(model) as (elsewhere, files):
        # Another host by its name, as the hub's files are.
        far = elsewhere.replace("127.0.0.1", "localhost")
        changes = {"root": model, "seen": [], "token": "hf_secret", "elsewhere": far}
        hub: type[Hub] = type("Handler", (Hub,), changes)
        with serving(hub) as port:
            monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
            monkeypatch.setenv("HF_TOKEN", "hf_wrong")
            with pytest.raises(reshard.NotFoundError, match="401") as told:
                reshard.open("hf://org/name")
            assert "hf_wrong" not in str(told.value)
            monkeypatch.setenv("HF_TOKEN", "hf_secret")
            for url in ("hf://org/name", "hf://org/name@main", "hf://org/name@refs%2Fpr%2F1"):
                out = tmp_path / url.rpartition("@")[2].replace("/", "-")
                assert reshard.convert(url, out).verified
                assert contents(out) == contents(tmp_path / "local")
            with pytest.raises(reshard.NotFoundError, match="404") as told:
                reshard.open("hf://org/other")
        # The token goes to the hub alone.
        assert all("hf_secret" in str(headers) for _, headers in hub.seen[1:])
        assert not any("hf_secret" in str(headers) for _, headers in files.seen)
        assert any(COMMIT in path for path, _ in hub.seen)


def test_an_answer_of_the_hub_that_is_no_json(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("obstore")
    monkeypatch.setattr("reshard.storage.hub.time.sleep", lambda seconds: None)

    def nested(self: Hub) -> None:
        self.seen.append((self.path, {}))
        self.send(200, b"[" * 200_000, {})

    hub: type[Hub] = type("Handler", (Hub,), {"root": model, "seen": [], "do_GET": nested})
    with serving(hub) as port:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
        with pytest.raises(reshard.NotFoundError, match="does not answer: its JSON cannot be read"):
            reshard.open("hf://org/name")
    assert len(hub.seen) == 6


def test_a_web_server(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("obstore")
    reshard.convert(model, tmp_path / "out")
    reshard.convert(tmp_path / "out", tmp_path / "again")
    with web(tmp_path) as (host, _):
        reshard.convert(f"http://{host}/out", tmp_path / "remote")
        assert contents(tmp_path / "remote") == contents(tmp_path / "again")
        one = f"http://{host}/model/model-00001-of-00002.safetensors"
        assert [*reshard.open(one).tensors] == ["w8"]
        with pytest.raises(reshard.NotFoundError):
            reshard.open(f"http://{host}/nothing")
    with web(tmp_path, index=False) as (host, _):
        # An output of reshard lists its files.
        assert reshard.verify(f"http://{host}/out").num_tensors == 2
        with pytest.raises(reshard.NotFoundError):
            reshard.open(f"http://{host}/model")
        stated = json.loads((tmp_path / "out" / "reshard.json").read_text())
        (tmp_path / "out" / "reshard.json").write_text(json.dumps({**stated, "files": {}}))
        with pytest.raises(reshard.IncompleteError, match="cannot be told"):
            reshard.verify(f"http://{host}/out")
        assert reshard.verify(tmp_path / "out").num_tensors == 2  # the copy


def test_urls_that_are_refused(
    bucket: Bucket, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each with what its hint leads to, where that can be followed here."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    url = bucket.upload(model, "m")
    for wrong, (words, mended) in {
        f"hdfs://host{model}": ("unsupported kind", str(model)),
        f"file://{model}": ("local file", str(model)),
        f"s3://user:pw@{BUCKET}/m": ("password", url),
        f"{url}?X-Amz-Signature=pw": ("signature", url),
        f"s3://{BUCKET}/a/../m": ("no place", url),
        "s3://": ("no place", url),
        "https://user:pw@host/m": ("password", None),
        "http://example.com/m": ("without encryption", None),
        "hf://gpt2": ("no place", None),
    }.items():
        with pytest.raises(reshard.OptionError, match=words) as told:
            reshard.open(wrong)
        result = CliRunner().invoke(command, ["inspect", wrong])
        assert result.exit_code == 2
        assert "pw" not in str(told.value) + result.output
        assert mended is None or reshard.open(mended).format == "huggingface"
    for function in (reshard.convert, reshard.watch):
        with pytest.raises(reshard.OptionError, match="is a URL"):
            function(model, "file:///x")
    assert not [*(tmp_path / "here").iterdir()]
