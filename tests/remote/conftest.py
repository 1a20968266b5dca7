"""A bucket on loopback, and the environment that leads to it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from reshard.storage import remote
from tests.remote.server import BUCKET, KEYS, Bucket, Proxy, store


@pytest.fixture(scope="session")
def moto() -> Iterator[Proxy]:
    pytest.importorskip("obstore")
    with store() as proxy:
        yield proxy


@pytest.fixture
def bucket(moto: Proxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    boto3 = pytest.importorskip("boto3")
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{moto.port}")
    client = boto3.client("s3", endpoint_url=f"http://{moto.server}")
    client.create_bucket(Bucket=BUCKET)
    moto.fault = lambda request: None
    moto.seen.clear()
    remote._ahead.cache_clear()  # what other tests read of the same objects
    found = Bucket(moto, client)
    yield found
    for name in found.names():
        client.delete_object(Bucket=BUCKET, Key=name)
    client.delete_bucket(Bucket=BUCKET)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small model folder of two shards, with a folder in it."""
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    rng = np.random.default_rng(0)
    shards = [{f"w{n}": rng.random((64, 1 << n), np.float32)} for n in range(8, 10)]
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file(shard, folder / file)
        weight_map.update(dict.fromkeys(shard, file))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "x", "torch_dtype": "bfloat16"}')
    (folder / "sub" / "note.txt").write_text("copied")
    return folder
