"""Arrangements of tensors: applied to entries as numpy would, and undone by their inverses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reshard.core import arrangement
from reshard.core.arrangement import (
    Arrangement,
    Arranger,
    Concat,
    Crop,
    Select,
    Stack,
    Transpose,
    Whole,
    inverse,
)
from reshard.core.dtypes import parse
from reshard.core.tensors import Box, TensorSpec
from reshard.core.tiling import check_tiling
from reshard.errors import PlanError
from tests.naming import tables

Array = np.ndarray[Any, Any]
FLOAT32 = parse("float32")


def by_numpy(made: Arrangement, arrays: Mapping[str, Array]) -> Array:
    """What an arrangement means."""
    if isinstance(made, Whole):
        return arrays[made.name]
    if isinstance(made, Crop):
        ends = zip(made.box.offsets, made.box.sizes, strict=True)
        cropped: Array = by_numpy(made.of, arrays)[tuple(slice(at, at + size) for at, size in ends)]
        return cropped
    if isinstance(made, Select):
        chosen: Array = by_numpy(made.of, arrays)[made.index]
        return chosen
    if isinstance(made, Transpose):
        turned: Array = np.swapaxes(by_numpy(made.of, arrays), made.dim0, made.dim1)
        return turned
    parts = [by_numpy(part, arrays) for part in made.parts]
    if isinstance(made, Concat):
        return np.concatenate(parts, made.dim)
    return np.stack(parts)


def split(array: Array, name: str, draw: st.DrawFn) -> list[tuple[Arrangement, Array]]:
    """A tensor taken apart at random, completely: each part with its values."""
    parts: list[tuple[Arrangement, Array]] = [(Whole(name), array)]
    for _ in range(draw(st.integers(0, 3))):
        made, values = parts.pop(draw(st.integers(0, len(parts) - 1)))
        what = draw(st.sampled_from(["cut", "select", "transpose"]))
        if what == "select" and values.ndim > 1:
            parts += [(Select(made, row), values[row]) for row in range(len(values))]
        elif what == "transpose" and values.ndim > 1:
            dim0, dim1 = draw(st.permutations(range(values.ndim)))[:2]
            parts.append((Transpose(made, dim0, dim1), values.swapaxes(dim0, dim1)))
        else:
            dim = draw(st.integers(0, values.ndim - 1))
            at = draw(st.integers(0, values.shape[dim]))
            for start, stop in ((0, at), (at, values.shape[dim])):
                if start < stop:
                    offsets = [0] * values.ndim
                    sizes = list(values.shape)
                    offsets[dim], sizes[dim] = start, stop - start
                    box = Box(values.shape, tuple(offsets), tuple(sizes))
                    parts.append((Crop(made, box), values.take(range(start, stop), dim)))
    return parts


@st.composite
def maps(draw: st.DrawFn) -> tuple[dict[str, Array], dict[str, Arrangement]]:
    """Tensors, and outputs that hold each of their elements once: cut apart, shuffled, joined."""
    arrays: dict[str, Array] = {}
    for number in range(draw(st.integers(1, 3))):
        shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
        arrays[f"t{number}"] = (np.arange(np.prod(shape), dtype=np.float32) + 100 * number).reshape(
            shape
        )
    parts = [part for name, array in arrays.items() for part in split(array, name, draw)]
    order: list[int] = draw(st.permutations(range(len(parts))))
    parts = [parts[place] for place in order]
    outputs: dict[str, Arrangement] = {}
    while parts:
        made, values = parts.pop()
        same = [part for part in parts if part[1].shape == values.shape]
        together = same[: draw(st.integers(0, len(same)))]
        if together and draw(st.sampled_from([True, False])):
            made = Stack((made, *(part[0] for part in together)))
        elif together:
            dim = draw(st.integers(0, values.ndim - 1))
            made = Concat((made, *(part[0] for part in together)), dim)
        else:
            together = []
        parts = [part for part in parts if all(part is not other for other in together)]
        outputs[f"o{len(outputs)}"] = made
    return arrays, outputs


def applied(made: Mapping[str, Arrangement], arrays: Mapping[str, Array]) -> dict[str, Array]:
    table = tables.entries({name: array.shape for name, array in arrays.items()})
    content = tables.files(dict(arrays))
    arranger = Arranger(table)
    found = {}
    for name, one in made.items():
        entry = arranger.make(one)
        check_tiling(entry)
        found[name] = tables.values(entry, content)
    return found


@given(maps())
def test_arranging_entries_is_what_numpy_does(drawn: tuple[Any, dict[str, Arrangement]]) -> None:
    arrays, outputs = drawn
    for name, values in applied(outputs, arrays).items():
        np.testing.assert_array_equal(values, by_numpy(outputs[name], arrays))


@given(maps())
def test_there_and_back_is_the_identity(drawn: tuple[Any, dict[str, Arrangement]]) -> None:
    arrays, outputs = drawn
    specs = {name: TensorSpec(name, FLOAT32, array.shape) for name, array in arrays.items()}
    back = inverse(outputs, specs)
    made = {name: np.ascontiguousarray(by_numpy(one, arrays)) for name, one in outputs.items()}
    assert back.keys() == arrays.keys()
    for name, values in applied(back, made).items():
        np.testing.assert_array_equal(values, arrays[name])


def test_a_stack_of_experts_comes_back_as_a_stack() -> None:
    specs = {"stacked": TensorSpec("stacked", FLOAT32, (2, 4, 3))}
    rows = Box((4, 3), (0, 0), (2, 3)), Box((4, 3), (2, 0), (2, 3))
    outputs: dict[str, Arrangement] = {
        f"{part}{expert}": Crop(Select(Whole("stacked"), expert), box)
        for expert in range(2)
        for part, box in zip("gu", rows, strict=True)
    }
    assert inverse(outputs, specs)["stacked"] == Stack(
        (Concat((Whole("g0"), Whole("u0")), 0), Concat((Whole("g1"), Whole("u1")), 0))
    )


@pytest.mark.parametrize(
    "outputs",
    [
        {"a": Crop(Whole("t"), Box((4,), (0,), (3,)))},
        {"a": Whole("t"), "b": Whole("t")},
        {},
    ],
)
def test_a_map_that_loses_or_repeats_elements_has_no_inverse(
    outputs: dict[str, Arrangement],
) -> None:
    with pytest.raises(PlanError, match="no inverse"):
        inverse(outputs, {"t": TensorSpec("t", FLOAT32, (4,))})


def test_the_sources_of_an_arrangement() -> None:
    made = Concat((Select(Stack((Whole("a"), Whole("b"))), 0), Transpose(Whole("c"), 0, 1)), 0)
    assert list(arrangement.sources(made)) == ["a", "b", "c"]
