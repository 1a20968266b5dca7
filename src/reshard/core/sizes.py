"""Bytes for people."""

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
