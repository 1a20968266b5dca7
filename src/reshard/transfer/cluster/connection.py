"""A Ray cluster: one that this run starts and ends on this machine, or one that is there.

The program must run on a node of the cluster, as Ray has it; `ray://` addresses, of its client
from elsewhere, are not taken.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from msgspec import Struct

from reshard.errors import OptionError, UnsupportedError, WriteError

# Bytes of a local cluster's object store, the least that Ray takes: tasks are a few KB.
_STORE_NBYTES = 80 << 20
_EXTRA = "Install the extra, in reshard's folder: pip install '.[ray]'."


class Workers(Struct, frozen=True):
    """Which cluster, and how many pieces at a time.

    `address` None: that of RAY_ADDRESS, else a cluster of `most` processors (None: all of this
    machine) that the run starts and ends. `most` None: as many pieces as the cluster has
    processors.
    """

    address: str | None = None
    most: int | None = None


def check_installed() -> None:
    """Raise `UnsupportedError` where Ray is not installed, `OptionError` for an address that no
    driver can have."""
    _ray()


def check_address(address: str | None) -> None:
    """Raise `OptionError` for an address of Ray's client."""
    if address is not None and "://" in address:
        raise OptionError(
            f"ray_address: {address!r} is an address of Ray's client, which works from elsewhere; "
            "files are planned and committed here.",
            hint="Run the command on a node of the cluster, with --ray-address auto.",
            option="ray_address",
        )


@contextmanager
def connected(workers: Workers) -> Iterator[Any]:
    """Ray, connected to the cluster; what was started or connected here ends with the block.

    Raises `WriteError` where the cluster cannot be reached or started.
    """
    ray = _ray()
    address = workers.address or os.environ.get("RAY_ADDRESS") or None
    check_address(address)
    if ray.is_initialized():  # by the program that calls reshard
        yield ray
        return
    try:
        with _signals_kept():
            ray.init(**_arguments(address, workers.most))
    except (OSError, RuntimeError, ValueError, TimeoutError, ray.exceptions.RayError) as error:
        raise _unreachable(address, error) from None
    try:
        yield ray
    finally:
        with _signals_kept():
            ray.shutdown()


def _arguments(address: str | None, most: int | None) -> dict[str, Any]:
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if address not in (None, "local"):
        return {"address": address, **quiet}
    # Ray reports on its use over the network, unless it is told not to.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    return {
        "address": "local",
        "num_cpus": most or os.cpu_count() or 1,
        "include_dashboard": False,
        "object_store_memory": _STORE_NBYTES,
        **quiet,
    }


def _unreachable(address: str | None, error: Exception) -> WriteError:
    reason = " ".join(str(error).split()) or type(error).__name__
    if address in (None, "local"):
        return WriteError(
            f"no Ray cluster could be started on this machine: {reason}",
            hint="Leave out --engine: threads of this process do the same.",
        )
    return WriteError(
        f"the Ray cluster at {address} cannot be reached: {reason}",
        hint="Run the command on a node of the cluster (see ray status), with --ray-address auto.",
    )


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray sets a handler of SIGTERM that ends the program at once."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if main and before is not None:
            signal.signal(signal.SIGTERM, before)


def _ray() -> Any:
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise UnsupportedError("Ray is not installed.", hint=_EXTRA) from None
    return ray
