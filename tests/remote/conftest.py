"""A bucket on loopback, and the environment that leads to it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

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
