"""The part of a checkpoint that `--prefix` names."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec.structs import replace

from reshard.core.tensors import Entry
from reshard.errors import NamesError, listed
from reshard.naming.search import clash, unwrap


def under(entries: Mapping[str, Entry], prefix: str) -> dict[str, Entry]:
    """The tensors below a prefix, by their names without it and without wrappers' parts.

    Raises `NamesError` where there is none, with what the names begin with, or where two different
    tensors get one name.
    """
    dotted = unwrap(prefix.removesuffix(".")) + "."
    found: dict[str, Entry] = {}
    owners: dict[str, Entry] = {}
    for entry in entries.values():
        clean = (unwrap(name) for name in entry.names)
        names = [name.removeprefix(dotted) for name in clean if name.startswith(dotted)]
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
