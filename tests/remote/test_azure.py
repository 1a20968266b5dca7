"""Azure's protocol, as Microsoft's own emulator speaks it: read, written, interrupted, continued.

The tests need Azurite, of npm: `npm install --prefix DIR azurite`, and DIR/node_modules/.bin on the
PATH, or RESHARD_TEST_AZURITE=DIR/node_modules/.bin/azurite-blob.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import reshard
from reshard.core.locations import located
from reshard.storage import remote
from reshard.transfer import claims, upload
from tests.child import until
from tests.files import contents

pytest.importorskip("obstore")
AZURITE = os.environ.get("RESHARD_TEST_AZURITE") or shutil.which("azurite-blob")
pytestmark = pytest.mark.skipif(AZURITE is None, reason="Azurite is not installed")
# The emulator's, the same everywhere (learn.microsoft.com, "Connect to Azurite").
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@pytest.fixture(scope="module")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of an emulator with a container."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = tmp_path_factory.mktemp("azurite")
    words = ["--blobPort", str(port), "--location", str(place), "--silent", "--skipApiVersionCheck",
             "--disableTelemetry"]  # fmt: skip
    process = subprocess.Popen(
        [str(AZURITE), *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True
    )
    try:
        until(lambda: _answers(port), process, 60)
        url = f"http://127.0.0.1:{port}"
        _create(url, "box")
        yield url
    finally:
        process.terminate()
        process.wait()


def _answers(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0


def _create(url: str, container: str) -> None:
    """Make a container, by a request that is signed with the account's key ("Shared Key")."""
    now = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime())
    headers = {"x-ms-date": now, "x-ms-version": "2021-08-06"}
    lines = "".join(f"{name}:{value}\n" for name, value in sorted(headers.items()))
    place = f"/{ACCOUNT}/{ACCOUNT}/{container}\nrestype:container"
    text = "PUT" + "\n" * 12 + lines + place
    signed = hmac.new(base64.b64decode(KEY), text.encode(), hashlib.sha256).digest()
    headers["Authorization"] = f"SharedKey {ACCOUNT}:{base64.b64encode(signed).decode()}"
    asked = urllib.request.Request(
        f"{url}/{ACCOUNT}/{container}?restype=container", data=b"", headers=headers, method="PUT"
    )
    asked.add_unredirected_header("Content-Type", "")
    with urllib.request.urlopen(asked, timeout=30) as answer:
        assert answer.status == 201


@pytest.fixture
def box(azurite: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of the container, with the settings that lead to it."""
    monkeypatch.setenv("AZURE_STORAGE_USE_EMULATOR", "true")
    monkeypatch.setenv("AZURITE_BLOB_STORAGE_URL", azurite)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", KEY)
    monkeypatch.setattr(upload, "_SMALL", 1000)  # in blocks
    return "az://box"


def there(url: str, tmp_path: Path) -> dict[str, bytes]:
    """What lies at a URL, by name."""
    place: Any = located(url)
    remote.forget(place)
    return {name: remote.read_whole(place / name)[0] for name in remote.below(place)}


def test_written_and_read(box: str, model: Path, tmp_path: Path) -> None:
    reshard.convert(model, tmp_path / "local", dtype="bfloat16")
    report = reshard.convert(model, f"{box}/out", dtype="bfloat16")
    assert report.verified
    assert there(f"{box}/out", tmp_path) == contents(tmp_path / "local")
    reshard.convert(f"{box}/out", tmp_path / "back", dtype="float32")
    reshard.convert(tmp_path / "local", tmp_path / "again", dtype="float32")
    assert contents(tmp_path / "back") == contents(tmp_path / "again")
    with pytest.raises(reshard.WriteError, match="the output exists"):
        reshard.convert(model, f"{box}/out")
    reshard.convert(model, tmp_path / "other", dtype="float16")
    reshard.convert(model, f"{box}/out", dtype="float16", overwrite=True)
    assert there(f"{box}/out", tmp_path) == contents(tmp_path / "other")


def test_interrupted_and_continued(
    box: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "BEAT", 0.02)
    options: dict[str, Any] = {"threads": 1, "max_shard_size": "100KB"}
    reshard.convert(model, tmp_path / "local", **options)
    seen = 0

    def stop(what: str, done: int, total: int) -> None:
        nonlocal seen
        seen += 1
        time.sleep(0.05)
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reshard.convert(model, f"{box}/run", resume=True, progress=stop, **options)
    with pytest.raises(reshard.IncompleteError, match="not complete"):
        reshard.open(f"{box}/run")
    report = reshard.convert(model, f"{box}/run", resume=True, **options)
    assert report.bytes_reused
    assert there(f"{box}/run", tmp_path) == contents(tmp_path / "local")
    with pytest.raises(KeyboardInterrupt):
        reshard.convert(model, f"{box}/left", progress=stop, threads=1)
    assert there(f"{box}/left", tmp_path) == {}
