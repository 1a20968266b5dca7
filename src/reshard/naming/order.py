"""Which parameters the tensors of a list without names belong to, from the model's order.

An optimizer numbers its parameters in the order in which they were given to it, group by group,
and trainers give them in the model's order. So a group's tensors are some of the model's
parameters, in order, of the same shapes:

    model     embed [98, 17]   q [20, 17]   q.bias [20]   up [27, 17]   norm [17]
    group 0   [98, 17]         [20, 17]                   [27, 17]
    group 1                                 [20]                        [17]

Where only one choice of parameters fits, that is the answer; where several fit, there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial


def unique_order(needed: int, available: int, fits: Callable[[int, int], bool]) -> list[int] | None:
    """The only ascending choice of `available` places such that tensor `k` of `needed` fits place
    `found[k]`; None where there is none, or more than one.

    The first choice from the front and the first from the back are the same exactly where there is
    no other.

    >>> unique_order(2, 3, lambda tensor, place: "xy"[tensor] == "xzy"[place])
    [0, 2]
    >>> unique_order(1, 2, lambda tensor, place: True) is None
    True
    """
    front = _greedy(needed, available, fits)
    back = _greedy(
        needed, available, lambda tensor, place: fits(needed - 1 - tensor, available - 1 - place)
    )
    if front is None or back is None:
        return None
    mirrored = [available - 1 - place for place in reversed(back)]
    return front if front == mirrored else None


def _greedy(needed: int, available: int, fits: Callable[[int, int], bool]) -> list[int] | None:
    found: list[int] = []
    place = 0
    for tensor in range(needed):
        while place < available and not fits(tensor, place):
            place += 1
        if place == available:
            return None
        found.append(place)
        place += 1
    return found


def groups_in_order(
    groups: Sequence[Sequence[Hashable]], model: Sequence[tuple[str, Hashable]]
) -> list[list[str]] | None:
    """The parameters of each group of tensors, given what each looks like (a shape, or a shape and
    values; None: not known, it could be any) and the model's parameters with what they look like,
    in the model's order.

    None where the groups do not determine them: no choice or several fit, or two groups take one.
    """
    taken: set[str] = set()
    found: list[list[str]] = []
    for group in groups:
        places = unique_order(len(group), len(model), partial(_alike, group, model))
        if places is None:
            return None
        names = [model[place][0] for place in places]
        if not taken.isdisjoint(names):
            return None
        taken.update(names)
        found.append(names)
    return found


def _alike(
    group: Sequence[Hashable], model: Sequence[tuple[str, Hashable]], tensor: int, place: int
) -> bool:
    return group[tensor] is None or group[tensor] == model[place][1]
