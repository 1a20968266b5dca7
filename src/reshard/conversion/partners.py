"""Check a conversion's plan by the rules of a finished model, before a byte is written.

No trained tensor may be paired with a stale one: a head with an embedding of another vocabulary, or
a base's head with a trained embedding. The rules are those of `naming/partners.py`, which `reshard
doctor` applies to other tools' folders.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from msgspec.structs import replace

from reshard.conversion.base_model import Base, section_of
from reshard.conversion.dtypes import OutputTensor
from reshard.core.tensors import Entry, Equal
from reshard.errors import PlanError
from reshard.naming import ties
from reshard.naming.partners import rows_in


def check_vocabulary(
    model: Iterable[OutputTensor], base: Base, patches: Mapping[str, object]
) -> None:
    """Refuse a plan in which head, embedding and `vocab_size` do not agree, where the base's do.

    Raises `PlanError`.
    """
    shapes = {tensor.spec.name: tensor.spec.shape for tensor in model}
    planned = rows_in(shapes, _patched(base.config, patches))
    before = rows_in({name: e.spec.shape for name, e in base.entries.items()}, base.config)
    if planned is None or planned.agree or (before is not None and not before.agree):
        return
    if planned.head is not None:
        raise PlanError(
            f"the input embedding would have {planned.rows} rows and the output head "
            f"{planned.head}: the vocabulary was resized, and the checkpoint does not hold both.",
            path=base.folder,
            hint="Convert a checkpoint that holds head and embedding of one vocabulary.",
        )
    path, size = next(iter(planned.stated.items()))
    raise PlanError(
        f"the input embedding would have {planned.rows} rows, and {path} in config.json is {size}.",
        path=base.folder,
        hint="Name the model that the training started from as the base.",
    )


def check_head(
    entries: Mapping[str, Entry], filled: Iterable[str], base: Base, equal: Equal
) -> None:
    """Refuse to pair a head of the base with an embedding that was trained. Raises `PlanError`."""
    for head in filled:
        embedding = ties.embedding_of(head, entries)
        if embedding is None or embedding not in base.entries:
            continue
        released = base.entries[embedding]
        # Masters of a frozen embedding equal the base's after rounding to its dtype.
        spec = replace(entries[embedding].spec, dtype=released.spec.dtype)
        trained = replace(entries[embedding], spec=spec)
        if trained.spec.shape != released.spec.shape or not equal(trained, released):
            raise PlanError(
                f"the checkpoint does not hold {head!r}, and {embedding!r} was trained: the base's "
                "head is not the one that it was trained with.",
                path=base.folder,
                tensor=head,
                hint=f"If the head was frozen, take it from the base by its name: --allow {head} "
                "together with --fill-from-base.",
            )


def _patched(config: Mapping[str, Any], patches: Mapping[str, object]) -> dict[str, Any]:
    """The config with its patches, by dotted paths of at most two names."""
    found = {key: dict(v) if isinstance(v, Mapping) else v for key, v in config.items()}
    for path, value in patches.items():
        section, key = section_of(found, path)
        if section is not None:
            section[key] = value
    return found
