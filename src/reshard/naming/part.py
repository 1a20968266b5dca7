"""The part of a checkpoint that `--prefix` names."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec.structs import replace

from reshard.core.catalog import Catalog
from reshard.core.state import ReadState
from reshard.core.tensors import Entry
from reshard.errors import NamesError, listed
from reshard.naming.search import clash, unwrap


def catalog_under(catalog: Catalog, prefix: str) -> Catalog:
    """The catalog of the tensors below a prefix, with what an optimizer holds of them.

    Raises `NamesError` as `under` does.
    """
    entries = under(catalog.entries, prefix)
    flat = (catalog.entries[name].names for name in catalog.unshaped)
    below = {new for names in flat for name in names if (new := _below(name, prefix)) is not None}
    unshaped = entries.keys() & below
    optimizer = catalog.optimizer
    if optimizer is not None:
        read, own = optimizer, {name: _below(name, prefix) for name in catalog.entries}
        inside = {name: new for name, new in own.items() if new is not None}
        optimizer = ReadState(lambda: read().only(inside))
    return replace(catalog, entries=entries, unshaped=frozenset(unshaped), optimizer=optimizer)


def _below(name: str, prefix: str) -> str | None:
    """A name without the prefix and without wrappers' parts; None where it is not below it."""
    dotted = unwrap(prefix.removesuffix(".")) + "."
    clean = unwrap(name)
    return clean.removeprefix(dotted) if clean.startswith(dotted) else None


def under(entries: Mapping[str, Entry], prefix: str) -> dict[str, Entry]:
    """The tensors below a prefix, by their names without it and without wrappers' parts.

    Raises `NamesError` where there is none, with what the names begin with, or where two different
    tensors get one name.
    """
    found: dict[str, Entry] = {}
    owners: dict[str, Entry] = {}
    for entry in entries.values():
        names = [name for old in entry.names if (name := _below(old, prefix)) is not None]
        if names:
            other = owners.setdefault(names[0], entry)
            if other.fragments != entry.fragments:
                raise clash(other.spec.name, entry.spec.name, names[0])
            found[names[0]] = replace(entry.renamed(names[0]), aliases=tuple(names[1:]))
    if not found:
        starts = list(dict.fromkeys(unwrap(name).partition(".")[0] for name in entries))
        raise NamesError(
            f"no tensor lies under the prefix {prefix!r}; the names begin with {listed(starts)}.",
            unexpected=tuple(entries),
            hint="Correct --prefix, or leave it out.",
        )
    return found
