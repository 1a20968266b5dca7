"""A training state in a few lines, and as JSON values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from msgspec import Struct

from reshard.core.sizes import size
from reshard.core.state import Group, TrainingState
from reshard.errors import brief, listed


class StateSummary(Struct, frozen=True):
    """A checkpoint's training state in a few lines; `state` is None where it holds none."""

    state: TrainingState | None = None

    def rows(self) -> list[tuple[str, str]]:
        """Lines of a label and its words, as `inspect --optimizer` shows them."""
        state = self.state
        if state is None:
            return [("optimizer", "none")]
        rows = [("optimizer", f"{self._moments(state)}{self._steps(state)}, {size(state.nbytes)}")]
        if state.masters:
            dtypes = Counter(entry.spec.dtype.name for entry in state.masters.values())
            rows.append(("masters", f"{len(state.masters)} in {', '.join(dtypes)}"))
        for at, group in enumerate(state.groups):
            rows.append((f"group {at}", f"{len(group.names)} parameters; {_settings(group)}"))
        if state.scheduler is not None:
            rows.append(("scheduler", listed(_words(state.scheduler), 12)))
        if state.counters:
            rows.append(("counters", listed(_words(state.counters))))
        if state.client_state:
            rows.append(("client", listed(_words(state.client_state))))
        if state.left_out:
            rows.append(("left out", listed(state.left_out)))
        return rows

    def _moments(self, state: TrainingState) -> str:
        parts = []
        for kind, table in state.moments.items():
            dtypes = ", ".join(dict.fromkeys(e.spec.dtype.name for e in table.values()))
            of = "" if len(table) == len(state.names) else f" of {len(table)} parameters"
            parts.append(f"{kind} ({dtypes}){of}")
        return f"{', '.join(parts) or 'no moments'} of {len(state.names)} parameters"

    def _steps(self, state: TrainingState) -> str:
        steps = " to ".join(map(str, state.step_range))
        return f", step {steps}" if steps else ""

    def to_json(self) -> dict[str, Any] | None:
        """The state as JSON values."""
        state = self.state
        if state is None:
            return None
        counts = Counter(step.count for step in state.steps.values())
        return {
            "source": state.source,
            "moments": {
                kind: {
                    "num_tensors": len(table),
                    "dtypes": dict(Counter(e.spec.dtype.name for e in table.values())),
                    "nbytes": sum(e.spec.nbytes for e in table.values()),
                }
                for kind, table in state.moments.items()
            },
            "num_masters": len(state.masters),
            "nbytes": state.nbytes,
            "steps": {str(count): number for count, number in sorted(counts.items())},
            "groups": [
                {
                    "num_parameters": len(group.names),
                    "names": list(group.names),
                    "hyperparameters": group.hyperparameters or None,
                }
                for group in state.groups
            ],
            "scheduler": state.scheduler,
            "counters": state.counters,
            "client_state": state.client_state,
            "scaler": state.scaler or None,
            "left_out": list(state.left_out),
            "findings": [finding.to_json() for finding in state.findings],
        }


def _settings(group: Group) -> str:
    """The hyperparameters that differ between runs, in words."""
    if not group.hyperparameters:
        return "its hyperparameters are not in the checkpoint"
    shown = {k: v for k, v in group.hyperparameters.items() if v is not None and v is not False}
    return listed(_words(shown), 12)


def _words(values: Mapping[str, object]) -> list[str]:
    texts = {k: value if isinstance(value, str) else brief(value) for k, value in values.items()}
    return [f"{name} {text}" for name, text in texts.items()]
