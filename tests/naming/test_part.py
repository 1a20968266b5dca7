"""The part of a checkpoint that `--prefix` names, where tensors elsewhere are flattened."""

from __future__ import annotations

from pathlib import Path

import pytest

from reshard.core.catalog import Catalog, Origin
from reshard.core.dtypes import FLOAT32
from reshard.core.tensors import Entry, Extent, FileRef, Fragment, TensorSpec, whole
from reshard.errors import NamesError
from reshard.naming.part import catalog_under


def _entry(name: str, *aliases: str) -> Entry:
    spec = TensorSpec(name, FLOAT32, (4,))
    extent = Extent(FileRef(name), 0, spec.nbytes)
    return Entry(spec, (Fragment(whole(spec.shape), extent, FLOAT32),), aliases=aliases)


def test_what_is_flattened_lies_in_another_part_or_in_this_one() -> None:
    entries = [
        _entry("actor.w"),
        _entry("reference.w"),
        _entry("actor.module.head", "reference.embed"),
    ]
    catalog = Catalog(
        "ranks",
        Origin(Path("run"), "torch"),
        {entry.spec.name: entry for entry in entries},
        unshaped=frozenset(("reference.w", "actor.module.head")),
    )
    actor, reference = catalog_under(catalog, "actor"), catalog_under(catalog, "reference")
    assert (set(actor.entries), actor.unshaped) == ({"w", "head"}, frozenset(("head",)))
    assert (set(reference.entries), reference.unshaped) == (
        {"w", "embed"},
        frozenset(("w", "embed")),
    )
    plain = Catalog("ranks", catalog.origin, entries={**actor.entries, "reference.w": entries[1]},
                    unshaped=frozenset(("reference.w",)))  # fmt: skip
    with pytest.raises(NamesError, match="no tensor lies under"):
        catalog_under(plain, "actor")
    below = Catalog("ranks", catalog.origin, {"actor.w": entries[0], "reference.w": entries[1]},
                    unshaped=frozenset(("reference.w",)))  # fmt: skip
    assert catalog_under(below, "actor").unshaped == frozenset()
