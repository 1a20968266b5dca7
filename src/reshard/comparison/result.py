"""The result of a comparison: its tensors and its sums, for people and for machines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, Literal

from msgspec import Struct
from msgspec.structs import asdict

from reshard.comparison.measures import Change
from reshard.comparison.sums import (
    MEASURES,
    Sum,
    by_layer,
    by_module,
    cells,
    moved_most,
    percent,
    short,
    starred,
    summed,
)
from reshard.core.dtypes import DType
from reshard.core.findings import Finding
from reshard.core.notebook import folded, html_table
from reshard.core.sizes import size
from reshard.core.tensors import Shape, TensorSpec
from reshard.errors import printable

Difference = Literal[
    "equal", "values", "shape", "dtype", "setting", "only in the first", "only in the second"
]


class Compared(Struct, frozen=True, gc=False):
    """A tensor of either side, and the result of its comparison.

    `first` and `second` are what each side has: for `equal` and `values` the dtype in which they
    were compared, of which the tensor takes `nbytes`. Only these two kinds have a shape and a
    change. A `setting` is not a tensor: an optimizer's step or hyperparameter, which differs.
    """

    name: str
    kind: Difference
    first: str
    second: str
    shape: tuple[int, ...] = ()
    nbytes: int = 0
    change: Change = Change()

    @property
    def measured(self) -> bool:
        """Whether its elements were compared: it is equal, or differs in values."""
        return self.kind in ("equal", "values")

    @property
    def differing(self) -> int:
        """How many of the elements differ."""
        return self.change.differing

    @property
    def numel(self) -> int:
        """How many elements were compared."""
        return self.change.numel

    @property
    def largest(self) -> float:
        """The largest |a - b| of elements that are finite on both sides."""
        return self.change.largest

    @property
    def mean(self) -> float:
        """The mean |a - b| of the elements that differ and are finite on both sides."""
        return self.change.mean

    def __str__(self) -> str:
        if self.kind == "equal":
            return f"equal: {self.first} {self.shape}"
        if self.kind != "values":
            return f"{self.kind}: {' and '.join(filter(None, (self.first, self.second)))}"
        return (
            f"{self.differing} of {self.numel} elements differ, by {self.largest:.3g} at most and "
            f"{self.mean:.3g} on average"
        )

    def to_json(self) -> dict[str, Any]:
        """The tensor as JSON values."""
        about = {"name": self.name, "kind": self.kind, "first": self.first, "second": self.second}
        change = {**asdict(self.change), "energy": list(self.change.energy)}
        more = {"shape": list(self.shape), "nbytes": self.nbytes, "relative": self.change.relative}
        return {**about, **more, **change}


class Comparison(Struct, frozen=True):
    """Two checkpoints, tensor by tensor, in natural order of their names.

    `findings` are those of both; where a path named a folder above, which checkpoint was taken.
    `sizes` counts the elements whose change is from 2**e to 2**(e + 1), as (e, count). `first` and
    `second` are what was compared.
    """

    tensors: tuple[Compared, ...]
    bytes_read: int
    findings: tuple[Finding, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()
    first: str = ""
    second: str = ""

    @property
    def differences(self) -> tuple[Compared, ...]:
        """The tensors that are not the same on both sides."""
        return tuple(one for one in self.tensors if one.kind != "equal")

    @property
    def num_equal(self) -> int:
        """How many tensors are the same bit for bit."""
        return sum(one.kind == "equal" for one in self.tensors)

    @property
    def measured(self) -> tuple[Compared, ...]:
        """The tensors whose elements were compared: those that are equal or differ in values."""
        return tuple(one for one in self.tensors if one.measured)

    @property
    def same(self) -> bool:
        """Whether no tensor differs."""
        return not self.differences

    @property
    def total(self) -> Sum:
        """All tensors that were measured, summed."""
        return summed("", self.measured)

    def layers(self) -> list[Sum]:
        """The tensors that were measured, by layer; those outside layers by themselves."""
        return by_layer(self.measured)

    def modules(self) -> list[Sum]:
        """The tensors that were measured, by their name without the layer's number."""
        return by_module(self.measured)

    def rows(self) -> list[tuple[str, str]]:
        """The summary as lines of a label and its words, as `diff` shows it."""
        total, differences = self.total, self.differences
        rows = [("tensors", f"{len(differences)} of {len(self.tensors)} differ")]
        apart = Counter(one.kind for one in differences if one.kind != "values")
        if apart:
            words = "; ".join(f"{count} {kind}" for kind, count in apart.items())
            rows[0] = ("tensors", f"{rows[0][1]} ({words})")
        if not total.differing:
            return rows
        changed = f"{total.differing:,} of {total.numel:,} differ ({percent(total.share)})"
        rows.append(("parameters", changed))
        rows.append(("bytes", f"{size(total.nbytes_differing)} of {size(total.nbytes)}"))
        relative = [one.change.relative or 0.0 for one in self.measured]
        mean, most = sum(relative) / len(relative), max(relative)
        each = f"of a tensor {short(mean)} on average, {short(most)} at most"
        rows.append(("change", f"{short(total.relative)} of the weights' norm; {each}"))
        top = max(self.measured, key=lambda one: one.largest)
        rows.append(("largest", f"{short(top.largest)}, in {top.name}"))
        if total.unmeasured:
            rows.append(("not finite", f"{total.unmeasured:,} of these elements: not measured"))
        for label, sums in (("layers", self.layers()), ("modules", self.modules())):
            most_moved = moved_most(sums, 3)
            if len(sums) > 1 and most_moved:
                words = ", ".join(f"{one.name} ({short(one.relative)})" for one in most_moved)
                rows.append((label, f"moved most: {words}"))
        return rows

    def apart(self) -> list[tuple[str, str, int]]:
        """Tensors that could not be measured, folded over layers: how, name, how many."""
        groups: dict[tuple[str, str], list[str]] = {}
        for one in self.differences:
            if one.kind != "values":
                name = starred(one.name)
                groups.setdefault((str(one), name), []).append(one.name)
        return [
            (how, names[0] if len(names) == 1 else name, len(names))
            for (how, name), names in groups.items()
        ]

    def __repr__(self) -> str:
        return f"<Comparison: {self.num_equal} tensors equal, {len(self.differences)} differ>"

    def __str__(self) -> str:
        return "\n".join(f"{label:<11} {printable(words)}" for label, words in self.rows())

    def _repr_html_(self) -> str:
        """The comparison as a notebook shows it: the summary, and tables to unfold."""
        below = "".join(
            folded(
                title,
                html_table("", ((s.name, *cells(s)) for s in sums), header=("", *MEASURES)),
            )
            for title, sums in (("by layer", self.layers()), ("by module", self.modules()))
            if not self.same
        )
        findings = [(finding.severity, finding.message) for finding in self.findings]
        title = f"{self.num_equal} tensors are equal, {len(self.differences)} differ"
        return html_table(title, [*self.rows(), *findings], more=below)

    def to_json(self) -> dict[str, Any]:
        """The comparison as JSON values, as `diff --json` prints it."""
        return {
            "same": self.same,
            "num_equal": self.num_equal,
            "summary": self.total.to_json(),
            "layers": _json(self.layers()),
            "modules": _json(self.modules()),
            "differences": [difference.to_json() for difference in self.differences],
            "sizes": [list(pair) for pair in self.sizes],
            "findings": [finding.to_json() for finding in self.findings],
        }


def _json(sums: Iterable[Sum]) -> list[dict[str, Any]]:
    return [{"name": one.name, **one.to_json()} for one in sums]


def described(spec: TensorSpec) -> str:
    """A tensor's dtype and shape in a comparison; one text for all that have them."""
    return _described(spec.dtype, spec.shape)


@lru_cache(maxsize=1024)
def _described(dtype: DType, shape: Shape) -> str:
    return f"{dtype} {shape}"
