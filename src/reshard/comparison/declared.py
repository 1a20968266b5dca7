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
        "The checkpoint that it was converted from; default: its own digests.",
        metavar="SRC",
    ),
    TAG,
    PREFIX,
    ROLE,
    Option(
        "base",
        Place(remote=True),
        "With a checkpoint to compare with: the model that it was converted onto. Without it, "
        "tensors that came from the base are counted and not compared.",
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
        "Fit both onto this Hugging Face model, and compare what they would become: two saves of "
        "one run by its names.",
        group="Input",
    ),
    Option(
        "spectrum",
        Flag(),
        "Also measure the rank of each matrix's change: which share of it the best approximations "
        "of rank 1 to 8 hold. Both are read a few times more.",
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
