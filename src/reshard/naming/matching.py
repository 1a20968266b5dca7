"""The differences between a checkpoint and its base, as one value.

The fit of the names creates it; the conversion, errors, the report, `inspect`, `diff` and
`reshard.json` use it. A conversion's decisions (to copy from the base or not) move names in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reshard.errors import Matching, Resize

__all__ = ["Matching", "Resize", "parsed"]


def parsed(names: Mapping[str, Any]) -> Matching:
    """The matching as `reshard.json` states it, vocabularies aside.

    Raises `TypeError`, `ValueError` or `AttributeError` for what is none.
    """
    missing, filled, unexpected = (
        tuple(map(str, names.get(what, ()))) for what in ("missing", "filled", "unexpected")
    )
    tied = {str(name): str(tie) for name, tie in names.get("tied", {}).items()}
    return Matching(missing, filled, unexpected, tied)
