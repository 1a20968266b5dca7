"""The message when a user or the system ends a run: what stands under the output's name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from reshard.transfer.targets import UNKNOWN, target_at


class Interrupted(KeyboardInterrupt):
    """A run was ended from outside; the message says what stands now."""


def writes(option: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A command whose `option` names its output; an interrupt says what stands there."""

    def wrapped(command: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(command)
        def run(**given: Any) -> Any:
            with telling_what_stands(given[option], resumable=bool(given.get("resume"))):
                return command(**given)

        return run

    return wrapped


@contextmanager
def telling_what_stands(target: Path | None, *, resumable: bool = False) -> Iterator[None]:
    """Raise `Interrupted` in place of a KeyboardInterrupt within the block.

    An output appears whole or not at all, so what stands under the name is the new output exactly
    if it is another folder than at first. None: the command writes no output. `resumable`: what is
    finished is kept.
    """
    again = "run the command again"
    output = None if target is None else target_at(target)
    before = None if output is None else output.identity()
    try:
        yield
    except KeyboardInterrupt as error:
        after = None if output is None else output.identity()
        if after == UNKNOWN:
            stands = f"What stands at {target} cannot be told; run the command again."
        elif target is None:
            stands = "No output was written."
        elif after != before and after is not None:
            stands = f"The new output is complete: {target}."
        elif after is not None:
            stands = f"{target} is unchanged; {again}."
        else:
            stands = f"No output was written to {target}; {again}."
        if resumable and output is not None and after == before and output.can_be_continued():
            stands = stands.removesuffix(f"{again}.")
            stands += f"what is finished is kept beside it: {again} to continue."
        raise Interrupted(stands) from error
