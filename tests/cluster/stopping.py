"""Runs that fail while other tasks end, one after the other: `python -m tests.cluster.stopping N`.

They are in a process of their own, because Ray's abort ends the one that it happens in.
"""

from __future__ import annotations

import os
import sys
from itertools import repeat

import ray

from reshard.transfer.cluster import wire
from reshard.transfer.cluster.connection import Workers
from reshard.transfer.cluster.tasks import Tasks
from tests.cluster import nodes


def main(rounds: int) -> None:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=3, object_store_memory=nodes.STORE, include_dashboard=False,
             log_to_driver=False, logging_level="ERROR")  # fmt: skip
    failed = 0
    for _ in range(rounds):
        try:  # no worker can read such a task, so the first that ends fails
            Tasks(ray, Workers(most=6), wire.HashAnswer).run(
                repeat((None, b""), 40), lambda job, answer: None
            )
        except Exception:
            failed += 1
    ray.shutdown()
    assert failed == rounds
    print("ended")


if __name__ == "__main__":
    main(int(sys.argv[1]))
