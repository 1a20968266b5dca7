"""The options of `watch`: its own, and those of the conversions."""

from __future__ import annotations

from reshard.conversion.declared import CONVERT
from reshard.core.options import Function, Integer, Number, Option, Place, Text, table

# What is decided here, save by save.
_OURS = ("source", "target", "tag", "overwrite", "dry_run", "progress")

#: The options of `reshard.watch` and `reshard watch` that are not those of a conversion.
WATCH = table(
    Option(
        "run", Place(), "The folder that the run saves into; it may not exist yet.", required=True
    ),
    Option("out", Place(), "The folder for the outputs: OUT/STEP for each save.", required=True),
    Option(
        "then",
        Text(),
        "A shell command to run after each conversion. The output's path is its last argument; "
        "RESHARD_OUTPUT, RESHARD_STEP and RESHARD_SOURCE are set.",
        group="Watching",
        metavar="COMMAND",
    ),
    Option(
        "keep",
        Integer(1),
        "Keep the outputs of the newest N saves and delete older ones, unless something in them "
        "was added or changed.",
        group="Watching",
        metavar="N",
    ),
    Option(
        "interval",
        Number(),
        "Seconds between two checks of the run; a save whose files changed since the last check "
        "is not complete.",
        30.0,
        group="Watching",
        metavar="SECONDS",
    ),
    Option("listen", Function(), "Called with each `Event`.", only_python=True),
)

#: The options of the conversions.
CONVERSION = {name: option for name, option in CONVERT.items() if name not in _OURS}
