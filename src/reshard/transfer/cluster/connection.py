"""A Ray cluster: one that this run starts and ends on this machine, or one that is there.

The program must run on a node of the cluster, as Ray has it; `ray://` addresses, of its client
from elsewhere, are not taken.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

from msgspec import Struct

from reshard.errors import OptionError, UnsupportedError, WriteError, shown

# Bytes of a local cluster's object store, the least that Ray takes: tasks are a few KB.
_STORE_NBYTES = 80 << 20
_MAX_PORT = 65535
# Names the folder of a cluster of our own, in the environment of its processes.
_MARK = "RESHARD_CLUSTER"
# Seconds in which the head of a cluster must answer.
_PATIENCE = 10.0
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
    """Raise `UnsupportedError` where Ray is not installed."""
    _ray()


def parse_address(text: str) -> str:
    """An address of a cluster, as it is. Raises `OptionError`, for one of Ray's client, too."""
    if text in ("auto", "local"):
        return text
    if "://" in text:
        raise OptionError(
            f"{shown(text)} is an address of Ray's client, which works from elsewhere; files are "
            "planned and committed here.",
            hint="Run the command on a node of the cluster, with --ray-address auto.",
        )
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > _MAX_PORT:
        raise OptionError(
            f"{shown(text)} is not HOST:PORT, auto or local.",
            hint="ray status shows the address of a cluster.",
        )
    return text


def _address(workers: Workers) -> str | None:
    """The address that is asked for, if one is."""
    stated = os.environ.get("RAY_ADDRESS")
    if workers.address is not None or not stated:
        return workers.address
    try:
        return parse_address(stated)
    except OptionError as error:
        raise OptionError(f"RAY_ADDRESS: {error.message}", hint=error.hint) from None


def _check_answers(address: str) -> None:
    """Raise `OSError` where nobody listens: Ray tries for more than a minute."""
    if address not in ("auto", "local"):
        import socket  # 3 ms, and every command reads this module for its options

        host, _, port = address.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), _PATIENCE).close()


@contextmanager
def connected(workers: Workers) -> Iterator[Any]:
    """Ray, connected to the cluster; what was started or connected here ends with the block.

    Raises `WriteError` where the cluster cannot be reached or started.
    """
    ray = _ray()
    if ray.is_initialized():  # by the program that calls reshard
        _check_same(ray, workers.address)
        yield ray
        return
    address = _address(workers)
    own = _scratch() if address in (None, "local") else nullcontext("")
    with own as scratch:
        try:
            _begin(ray, address, _arguments(address, workers.most, scratch))
            yield ray
        finally:
            ray.shutdown()


@contextmanager
def _scratch() -> Iterator[str]:
    """A folder for the sockets and logs of a cluster of our own, which goes with the cluster.

    Its path is short: a socket's has at most 107 bytes, and Ray adds 65. Where this program is
    killed, another ends what is left (`keeper`).
    """
    import subprocess  # they take 6 ms of each start, and conversions without Ray need none
    import tempfile

    from reshard.transfer.cluster import keeper

    made = tempfile.TemporaryDirectory(prefix="reshard-", dir="/tmp", ignore_cleanup_errors=True)
    waiting = subprocess.Popen(
        [sys.executable, "-I", "-S", keeper.__file__, f"{_MARK}={made.name}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C and signals to the group are not for it
    )
    try:
        with made:
            yield made.name
    finally:
        waiting.communicate()


def _begin(ray: Any, address: str | None, arguments: Mapping[str, Any]) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    ended: SystemExit | None = None
    os.environ[_MARK] = arguments.get("_temp_dir", "")
    try:
        _check_answers(arguments["address"])
        ray.init(**arguments)
    except SystemExit as error:
        ended = error
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise _unreachable(address, error) from None
    finally:
        del os.environ[_MARK]  # the cluster's processes have it from its first
        # Ray's own ends the program at once, whatever is half done.
        if threading.current_thread() is threading.main_thread() and handler is not None:
            signal.signal(signal.SIGTERM, handler)
    if ended is not None:  # by Ray's handler: the signal is the program's own to handle
        signal.raise_signal(signal.SIGTERM)
        raise ended


def _arguments(address: str | None, most: int | None, scratch: str) -> dict[str, Any]:
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
        "_temp_dir": scratch,
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


def _check_same(ray: Any, address: str | None) -> None:
    """Raise `OptionError` where the program is connected to another cluster than is asked for."""
    there = ray.get_runtime_context().gcs_address
    if address not in (None, "auto", there):
        raise OptionError(
            f"ray_address: this program is connected to the cluster at {there} already.",
            hint="Leave out ray_address, or call ray.shutdown() first.",
            option="ray_address",
        )


def _ray() -> Any:
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise UnsupportedError("Ray is not installed.", hint=_EXTRA) from None
    return ray
