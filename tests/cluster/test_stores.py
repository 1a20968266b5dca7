"""Workers read checkpoints where they lie in object stores."""

from __future__ import annotations

from pathlib import Path

import pytest

import reshard
from reshard.conversion.options import To
from tests.files import contents
from tests.golden.table import HERE
from tests.remote.conftest import bucket, moto
from tests.remote.server import Bucket

pytest.importorskip("ray")
pytest.importorskip("obstore")
__all__ = ["bucket", "moto"]


@pytest.mark.slow
def test_a_checkpoint_in_a_store_gives_the_same_bytes(bucket: Bucket, tmp_path: Path) -> None:
    """The cluster of this machine has the settings of the command."""
    cases: tuple[tuple[str, To], ...] = (("zero3", "hf"), ("dcp", "dcp"))
    for name, to in cases:
        local = HERE / name / "checkpoint"
        url = bucket.upload(local, f"runs/{name}")
        reshard.convert(local, tmp_path / name, to=to)
        seen = len(bucket.proxy.seen)
        out = tmp_path / f"{name}-ray"
        assert reshard.convert(url, out, to=to, engine="ray", threads=2).verified
        assert contents(out) == contents(tmp_path / name)
        assert len(bucket.proxy.seen) > seen
