"""A conversion into a store that can be killed, a second one beside it, and a forged journal."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

import reshard
from reshard.transfer import journal
from tests.files import contents
from tests.remote.killed import Killer
from tests.remote.server import BUCKET, Bucket
from tests.resume.runs import model

OUT = f"s3://{BUCKET}/out"
CLAIM = "out/reshard.partial.json"


class Run:
    """A conversion into the store; `whole` is what it gives."""

    def __init__(self, killer: Killer, bucket: Bucket, at: Path, **options: Any) -> None:
        self.at = model(at / "in")
        self.source = self.at / "trained"
        self.options = {"base": self.at / "base", "threads": 1, "max_shard_size": 7000} | options
        self.bucket = bucket
        self._killer = killer
        self.expected = self.convert(at / "whole")
        self.whole = contents(at / "whole")

    def convert(self, target: str | Path = OUT, **more: Any) -> reshard.Report:
        return reshard.convert(self.source, target, **{**self.options, **more})

    def killed(self, after: int, what: str = "put", **more: Any) -> bool:
        return self._killer.killed(after, self.source, OUT, what=what, **self.options, **more)

    def assert_whole(self) -> None:
        """The output is complete, and nothing else is left."""
        assert self.bucket.download("out") == self.whole
        assert not self.bucket.uploads()

    def clear(self) -> None:
        """Delete the output."""
        for name in self.bucket.names("out"):
            self.bucket.client.delete_object(Bucket=BUCKET, Key=name)

    def unfinished(self) -> bool:
        with pytest.raises(reshard.IncompleteError, match="not complete"):
            reshard.open(OUT)
        return True


class Meanwhile:
    """Progress of a conversion, at whose first step another thread runs `work`, which is refused.

    `refusals` are the messages.
    """

    def __init__(self, work: Callable[[], object]) -> None:
        self._work = work
        self._began = False
        self.refusals: list[str] = []

    def __call__(self, stage: str, done: int, total: int) -> None:
        if not self._began:
            self._began = True
            thread = threading.Thread(target=self._refused)
            thread.start()
            thread.join()

    def _refused(self) -> None:
        with pytest.raises(reshard.WriteError) as caught:
            self._work()
        self.refusals.append(str(caught.value))


def forge(bucket: Bucket, file: str, at: int) -> None:
    """Damage an object, and have the journal state it so."""
    tag = bucket.client.head_object(Bucket=BUCKET, Key=file)["ETag"]
    data = bytearray(bucket.get(file))
    data[at] ^= 1
    bucket.put(file, bytes(data))
    new = bucket.client.head_object(Bucket=BUCKET, Key=file)["ETag"]
    for name in bucket.names("out/reshard.partial.0"):
        lines = map(journal.decoded, bucket.get(name).splitlines(keepends=True))
        forged = [
            msgspec.structs.replace(line, tag=new)
            if isinstance(line, journal.Sealed) and line.tag == tag
            else line
            for line in lines
            if line is not None
        ]
        bucket.put(name, b"".join(map(journal.encoded, forged)))
