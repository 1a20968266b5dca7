"""A real Ray cluster of several nodes on this machine, and what becomes of its processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# A node's object store, in bytes: the least that Ray takes.
STORE = 80 << 20
# In the environment of all processes of a cluster that this process started.
_MARK = "RESHARD_TEST_CLUSTER_OF"


@contextmanager
def cluster(nodes: int) -> Iterator[Any]:
    """`nodes` nodes of one processor each, the first of them the head."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ[_MARK] = str(os.getpid())
    from ray.cluster_utils import Cluster

    of_a_node = {"num_cpus": 1, "object_store_memory": STORE}
    made = Cluster(initialize_head=True, head_node_args={**of_a_node, "include_dashboard": False})
    try:
        for _ in range(nodes - 1):
            made.add_node(**of_a_node, wait=False)
        made.wait_for_nodes()
        yield made
    finally:
        made.shutdown()


def processes(file: str, words: bytes) -> list[int]:
    """The processes of this user whose `file` in /proc holds some words."""
    found = []
    for place in Path("/proc").iterdir():
        with suppress(OSError):
            if place.name.isdigit() and words in (place / file).read_bytes():
                found.append(int(place.name))
    return found


def at_work() -> list[int]:
    """The workers that are at work on a task just now, but those of another test run's cluster."""
    ours = processes("environ", f"{_MARK}={os.getpid()}\0".encode())
    return sorted({*processes("cmdline", b"ray::work")} & {*ours})


def writers(folder: Path) -> list[int]:
    """Processes that have a file of an unfinished output below a folder open, deleted ones too."""
    found = []
    for place in Path("/proc").iterdir():
        if not place.name.isdigit():
            continue
        with suppress(OSError):
            for fd in (place / "fd").iterdir():
                with suppress(OSError):
                    path = os.readlink(fd)  # noqa: PTH115 (of /proc)
                    if path.startswith(f"{folder}/") and ".partial-" in path:
                        found.append(int(place.name))
    return found


def kill(pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
