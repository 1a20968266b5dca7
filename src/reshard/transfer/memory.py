"""How much memory a transfer will take."""

from __future__ import annotations

import platform
from contextlib import suppress
from pathlib import Path

from reshard.core.fragments import strided
from reshard.core.plan import Plan
from reshard.transfer.making import MAKER_NBYTES, STRIDED_MAKER_NBYTES

_STATUS = Path("/proc/self/status")
# Bytes that each thread has beside its buffers: its stack, and what the allocator keeps.
_THREAD_NBYTES = 1 << 20
# Bytes of a tensor's digest, pieces and line in `reshard.json`.
_TENSOR_NBYTES = 2 << 10


def needed(plan: Plan, threads: int) -> int:
    """About how many bytes the process will hold at most, if it carries out a plan.

    What the process held at most so far is part of it: the interpreter and the plan.
    """
    tensors, turned = 0, False
    for slot in plan.slots():
        tensors += 1
        turned = turned or strided(slot.source)
    buffers = STRIDED_MAKER_NBYTES if turned else MAKER_NBYTES
    return (
        (peak_cpu_nbytes() or 0) + threads * (buffers + _THREAD_NBYTES) + tensors * _TENSOR_NBYTES
    )


def peak_cpu_nbytes() -> int | None:
    """Largest resident memory of this process, in bytes; None where it cannot be read.

    On Linux since its mark was last reset; getrusage would count what a process took before it was
    another program.
    """
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows has no such module.
        return None
    # getrusage counts KiB on Linux, bytes on macOS.
    unit = 1 if platform.system() == "Darwin" else 1024
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit


def give_back() -> None:
    """Give freed memory back to the system, where the C library can be asked to (glibc).

    Threads that end leave it in heaps of their own: 37 MB where four made 200,000 tensors.
    """
    import ctypes

    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
