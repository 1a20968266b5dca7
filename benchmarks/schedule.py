"""How many rounds fit into a budget: plain arithmetic of seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

# Rounds of reshard and cp that come before the peers where time is short.
_OWN_FIRST = 2


@dataclass(frozen=True, slots=True)
class Rounds:
    """How often the own contenders run, and how often the peers."""

    own: int
    peers: int


def rounds(left: float, own: float, peers: float, most: Rounds) -> Rounds:
    """What fits into `left` seconds, where a round takes `own` seconds and the peers' `peers`.

    At least one round of the own contenders. A few of these come first, then the peers once, then
    the rest of the own, then the rest of the peers.
    """
    first = min(most.own, _OWN_FIRST)
    if left < first * own:
        return Rounds(max(1, int(left / own)), 0)
    left -= first * own
    theirs = min(most.peers, 1) if peers and left >= peers else 0
    left -= theirs * peers
    more = min(most.own - first, int(left / own)) if own else 0
    left -= more * own
    if theirs:
        theirs += min(most.peers - theirs, int(left / peers))
    return Rounds(first + more, theirs)


@dataclass(slots=True)
class Pace:
    """How far guesses (of seconds, of bytes) were off, by what was guessed."""

    off: dict[tuple[str, str], float] = field(default_factory=dict)

    def note(self, what: tuple[str, str], guess: float, amount: float) -> None:
        """That it was so much where so much was guessed."""
        self.off[what] = amount / guess

    def expect(self, what: tuple[str, str], guess: float) -> float:
        """A guess, as far off as the last one was."""
        return guess * self.off.get(what, 1.0)


def share(left: float, costs: Sequence[float], place: int) -> float:
    """The seconds of `left` that cell `place` gets of those still to come, by their costs."""
    return left * costs[place] / sum(costs[place:])
