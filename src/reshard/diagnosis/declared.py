"""The options of `doctor`."""

from __future__ import annotations

from reshard.checkpoint import PREFIX, ROLE, TAG
from reshard.conversion.declared import PROGRESS, THREADS
from reshard.core.findings import CODES
from reshard.core.options import Choice, Codes, Option, Place, table
from reshard.diagnosis.engines import ENGINES

#: The options of `reshard.doctor` and `reshard doctor`.
DOCTOR = table(
    Option(
        "folder",
        Place(remote=True),
        "The exported model, from any tool, or a training checkpoint.",
        required=True,
    ),
    Option(
        "base",
        Place(remote=True),
        "The Hugging Face model that training started from; doctor compares names, shapes, ties "
        "and values with it.",
        short="b",
    ),
    TAG,
    PREFIX,
    ROLE,
    Option(
        "repair",
        Place(),
        "Write a repaired copy to the new folder OUT, if every error can be repaired.",
        metavar="OUT",
    ),
    Option(
        "engine",
        Choice(tuple(ENGINES)),
        "Also check whether this inference engine loads the folder; the engine need not be "
        "installed.",
        spelt="for",
    ),
    Option(
        "strict",
        Codes({code: about for code, about in CODES.items() if "doctor" in about.by}),
        "Exit with code 1 for warnings too; with codes, only for the findings with these codes.",
        False,
        metavar="CODE",
    ),
    THREADS,
    PROGRESS,
)
