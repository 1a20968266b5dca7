"""`.metadata` without the ranks' plans for the save, which are not needed.

They are the last field of the record that is pickled: a third of a small file, and more of a large
one. The pickle is ended before them, and the frame that holds the cut is made shorter.

    80 04  95 <length> ...  95 <length> ... "all_local_plans" ... u b .
                                            ^ u b .
"""

from __future__ import annotations

#: What comes before the plans. All that is needed of the file comes before it: whatever the ranks'
#: plans take, they are not read.
PLANS = b"\x8c\x0fall_local_plans"
# Sets the fields that are there, builds the record, ends the pickle.
_END = b"ub."
_START = b"\x80\x04"
_FRAME = 0x95
# The opcode of a frame and its length, a little-endian integer of 8 bytes.
_HEAD_NBYTES = 9


def without_plans(data: bytes) -> bytes | None:
    """The same pickle without the plans; None where they are not where they are expected.

    `data` may be the beginning of a longer file.
    """
    cut = data.find(PLANS)
    if cut < 0 or not data.startswith(_START):
        return None
    start = len(_START)
    while start + _HEAD_NBYTES <= cut and data[start] == _FRAME:
        inside = start + _HEAD_NBYTES
        end = inside + int.from_bytes(data[start + 1 : inside], "little")
        if end > cut:
            length = (cut - inside + len(_END)).to_bytes(_HEAD_NBYTES - 1, "little")
            return data[: start + 1] + length + data[inside:cut] + _END
        start = end
    return None


def ends_well(tail: bytes) -> bool:
    """Whether the last bytes of a file are those of such a pickle, which was not cut off."""
    return tail.endswith(_END)
