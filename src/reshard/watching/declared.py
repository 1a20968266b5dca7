"""The options of `watch`: its own, and those of the conversions."""

from __future__ import annotations

from reshard.conversion.declared import CONVERT
from reshard.core.options import Function, Integer, Number, Option, Place, Text, table

# What is decided here, save by save.
_OURS = ("source", "target", "tag", "overwrite", "dry_run", "progress")

#: The options of `reshard.watch` and `reshard watch` that are not those of a conversion.
WATCH = table(
    Option("run", Place(), "The folder that the run saves into, even later.", required=True),
    Option("out", Place(), "Where the outputs go: OUT/STEP for each save.", required=True),
    Option(
        "then",
        Text(),
        "What to run after each conversion, by the shell, with the output's path as its last "
        "argument; RESHARD_OUTPUT, RESHARD_STEP and RESHARD_SOURCE are set.",
        group="Watching",
        metavar="COMMAND",
    ),
    Option(
        "keep",
        Integer(1),
        "Keep the outputs of the newest N saves; older ones are deleted, unless something in them "
        "was added or changed.",
        group="Watching",
        metavar="N",
    ),
    Option(
        "interval",
        Number(),
        "Seconds between two looks at the run; a save whose files changed since the last is not "
        "complete.",
        30.0,
        group="Watching",
        metavar="SECONDS",
    ),
    Option("listen", Function(), "Called with each `Event`.", only_python=True),
)

#: The options of the conversions.
CONVERSION = {name: option for name, option in CONVERT.items() if name not in _OURS}
