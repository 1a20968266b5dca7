"""Tensors without names are told by order and shape, or not at all."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from reshard.naming.order import groups_in_order, unique_order


@given(st.text("ab", max_size=4), st.text("ab", max_size=7))
def test_it_is_the_only_choice_there_is(tensors: str, places: str) -> None:
    every = [
        list(choice)
        for choice in itertools.combinations(range(len(places)), len(tensors))
        if [places[place] for place in choice] == list(tensors)
    ]
    found = unique_order(
        len(tensors), len(places), lambda tensor, place: tensors[tensor] == places[place]
    )
    assert found == (every[0] if len(every) == 1 else None)


def test_two_groups_share_the_model() -> None:
    model = [("embed", (9, 2)), ("up", (4, 2)), ("bias", (4,)), ("down", (2, 4)), ("norm", (2,))]
    found = groups_in_order([[(9, 2), (4, 2), (2, 4)], [(4,), (2,)]], model)
    assert found == [["embed", "up", "down"], ["bias", "norm"]]


def test_a_choice_that_two_groups_make_is_none() -> None:
    model = [("a", (2,)), ("b", (3,))]
    assert groups_in_order([[(2,)], [(2,)]], model) is None
    assert groups_in_order([[(4,)]], model) is None
    twice = [("a", (2,)), ("b", (2,))]
    assert groups_in_order([[(2,)]], twice) is None
