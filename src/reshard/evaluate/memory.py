"""Peak memory of one call: resident memory of the process, and what PyTorch held on the GPUs."""

from __future__ import annotations

from pathlib import Path

import torch

from reshard.transfer.memory import peak_cpu_nbytes

_MARK = Path("/proc/self/clear_refs")


def reset_peaks() -> str | None:
    """Start a new measurement; returns where the CPU's peak is read, None if it cannot be read.

    Only Linux can reset the mark of the largest resident memory; elsewhere the figure is the
    largest since the process began, and the returned text says so.
    """
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        torch.cuda.reset_peak_memory_stats(index)
    try:
        # proc(5): writing 5 to clear_refs resets the peak resident set size.
        _MARK.write_text("5")
    except OSError:
        peak = peak_cpu_nbytes()
        return None if peak is None else "largest resident memory since the process began"
    return "largest resident memory during the call"


def peak_gpu_nbytes() -> int | None:
    """Largest memory that tensors took since `reset_peaks`, on all GPUs together, in bytes."""
    if not torch.cuda.is_available():
        return None
    peaks = (torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    return int(sum(peaks))
