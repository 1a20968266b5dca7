"""The errors of the pure parts of this room: they know what is wrong, but not in which file."""

from __future__ import annotations


class Malformed(Exception):  # noqa: N818 (it never leaves this room)
    """Data that contradicts itself or its format, in words without a full stop.

    Whoever knows the file turns it into a `FormatError`.
    """


class EndOfPickle(Exception):  # noqa: N818 (it never leaves this room)
    """An opcode's argument goes past the end of the data."""


def show(value: object) -> str:
    """A value of a file, for a message: short and printable, whatever the value is."""
    if type(value) is str:
        return repr(value if len(value) <= 80 else value[:77] + "...")
    return f"{value}"[:40] if type(value) is int else f"a {type(value).__name__}"


class Compressed(Malformed):
    """A compressed entry of a zip; torch.save compresses none, TorchScript compresses its code."""

    def __init__(self, name: str, shown: str) -> None:
        super().__init__(f"its entry {shown} is compressed; torch.save compresses none")
        self.name = name
