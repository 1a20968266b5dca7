"""How long operations report their progress."""

from __future__ import annotations

from collections.abc import Callable

#: Called with (bytes done, bytes in all).
Progress = Callable[[int, int], None]

#: Called with (what is being done, as "write" or "verify"; bytes done; bytes in all).
StagedProgress = Callable[[str, int, int], None]
