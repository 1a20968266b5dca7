"""The options of `doctor`."""

from __future__ import annotations

from reshard.conversion.declared import PROGRESS, THREADS
from reshard.core.options import Option, Place, table

#: The options of `reshard.doctor` and `reshard doctor`.
DOCTOR = table(
    Option("folder", Place(), "The exported model, from any tool.", required=True),
    Option(
        "base",
        Place(),
        "The Hugging Face model that training started from: names, shapes, ties and values are "
        "compared with it.",
        short="b",
    ),
    Option(
        "repair",
        Place(),
        "Write a repaired copy as a new folder, if every error can be repaired.",
        metavar="OUT",
    ),
    THREADS,
    PROGRESS,
)
