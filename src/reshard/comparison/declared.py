"""The options of `verify` and `diff`."""

from __future__ import annotations

from reshard.checkpoint import PREFIX, ROLE, TAG
from reshard.conversion.declared import PROGRESS, THREADS
from reshard.core.options import Flag, Option, Place, table

#: The options of `reshard.verify` and `reshard verify`.
VERIFY = table(
    Option("folder", Place(remote=True), "The converted folder.", required=True),
    Option(
        "against",
        Place(remote=True),
        "Compare with this checkpoint; default: with the digests in the folder's reshard.json.",
        metavar="SRC",
    ),
    TAG,
    PREFIX,
    ROLE,
    Option(
        "base",
        Place(remote=True),
        "With --against: the base of the conversion. Without it, tensors that came from the base "
        "are counted but not compared.",
        group="Input",
        short="b",
    ),
    THREADS,
    PROGRESS,
)

#: The options of `reshard.diff` and `reshard diff`.
DIFF = table(
    Option("first", Place(remote=True), "A checkpoint, of any format.", required=True),
    Option("second", Place(remote=True), "Another.", required=True),
    Option(
        "base",
        Place(remote=True),
        "First map both onto the names of this Hugging Face model, then compare them.",
        group="Input",
    ),
    Option(
        "spectrum",
        Flag(),
        "Also measure the rank of each matrix's change: the share of the change that its best "
        "approximations of rank 1 to 8 contain. This reads both checkpoints several more times.",
        default=False,
    ),
    Option(
        "optimizer",
        Flag(),
        "Also compare the training state: moments by layer, steps, hyperparameters.",
        default=False,
    ),
    PROGRESS,
)
