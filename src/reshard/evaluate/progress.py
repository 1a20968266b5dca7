"""The events of a run. The library prints nothing: the caller shows the events."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from reshard.evaluate.report import Answer, Score


@dataclass(frozen=True, slots=True)
class Event:
    """A step of a stage. `total` is None where it is not known; `result` is a prompt's outcome,
    sent once, as soon as it is known. `text` is the new part of the answer to `prompt`."""

    stage: str
    done: int = 0
    total: int | None = None
    result: Answer | Score | None = None
    prompt: str = ""
    text: str = ""


Listener = Callable[[Event], None]


def silent(event: Event) -> None:
    """Listen to nothing."""
