"""How long operations report their progress."""

from __future__ import annotations

from collections.abc import Callable

#: Called with (bytes done, bytes in all).
Progress = Callable[[int, int], None]

#: Called with (what is being done, as "write" or "verify"; bytes done; bytes in all).
StagedProgress = Callable[[str, int, int], None]


def stage(progress: StagedProgress | None, what: str) -> Progress | None:
    """The progress of one stage; None where nobody asks for progress."""
    return None if progress is None else lambda done, total: progress(what, done, total)
