"""How many rounds fit into a budget: plain arithmetic of seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

# Rounds of reshard and cp that come before any peer's where time is short.
_OWN_FIRST = 3


@dataclass(frozen=True, slots=True)
class Rounds:
    """How often the own contenders run, and how often the peers."""

    own: int
    peers: int


def rounds(left: float, own: float, peers: float, most: Rounds) -> Rounds:
    """What fits into `left` seconds, where a round takes `own` seconds and the peers' `peers`.

    At least one round of the own contenders. A few of these come before the peers, and the peers
    before the rest.
    """
    first = min(most.own, _OWN_FIRST)
    if left < first * own:
        return Rounds(max(1, int(left / own)), 0)
    left -= first * own
    theirs = min(most.peers, int(left / peers)) if peers else 0
    left -= theirs * peers
    return Rounds(min(most.own, first + (int(left / own) if own else 0)), theirs)


@dataclass(slots=True)
class Pace:
    """What something grew to, by what it is: the size (GB) at which it was last measured, and how
    much it was there (seconds, bytes)."""

    known: dict[tuple[str, str], tuple[float, float]] = field(default_factory=dict)

    def note(self, what: tuple[str, str], gb: float, amount: float) -> None:
        """That it was so much at this size."""
        self.known[what] = (gb, amount)

    def expect(self, what: tuple[str, str], gb: float, guess: float) -> float:
        """How much it will be: in proportion to the size; `guess` where it was never measured."""
        if what not in self.known:
            return guess
        size, amount = self.known[what]
        return amount * max(gb / size, 1)


def share(left: float, costs: Sequence[float], place: int) -> float:
    """The seconds of `left` that cell `place` gets of those still to come, by their costs."""
    return left * costs[place] / sum(costs[place:])
