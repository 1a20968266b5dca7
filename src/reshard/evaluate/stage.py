"""A part of the run whose failure is a result: it is recorded, and the run goes on."""

from __future__ import annotations

import traceback
from types import TracebackType

from reshard.errors import ReshardError
from reshard.evaluate.report import Failure


class Stage:
    """Records what is raised inside it as a `Failure`.

    A model's class, its remote code, a template in its tokenizer and the device may raise
    anything, and a run must report it, so every `Exception` is recorded. Interrupts
    pass through.
    """

    def __init__(self, name: str, failures: list[Failure]) -> None:
        self.name = name
        self.failure: Failure | None = None
        self._failures = failures

    def __enter__(self) -> Stage:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        own = isinstance(error, ReshardError)
        lines = traceback.format_exception(kind, error, trace)
        self.failure = Failure(
            stage=self.name,
            error=type(error).__name__,
            message=str(error).strip() or "no message",
            traceback=None if own else "".join(lines),
        )
        self._failures.append(self.failure)
        return True
