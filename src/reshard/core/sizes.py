"""Bytes and time spans for people."""

from __future__ import annotations


def size(nbytes: int) -> str:
    """Bytes for people, in decimal units.

    >>> size(1234567)
    '1.23 MB'
    """
    value = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def span(seconds: float) -> str:
    """A time span for people, roughly; a negative one, between two clocks, is none.

    >>> span(7200), span(-1)
    ('2 hours', '0 seconds')
    """
    for nseconds, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * nseconds:
            return f"{seconds / nseconds:.0f} {unit}"
    return f"{max(seconds, 0.0):.0f} seconds"
