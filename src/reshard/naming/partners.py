"""Head, embedding and `vocab_size`, which must agree in a plan and in a finished model.

The rules stand only here. A conversion checks its plan by them before it writes a byte, and
`reshard doctor` checks any folder.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Any

from msgspec import Struct

from reshard.core.tensors import Entry, Shape
from reshard.naming import ties
from reshard.naming.families import SPARE_ROWS
from reshard.naming.schema import Schema, levels, says_tied, says_untied, stating_levels

_TIE = "tie_word_embeddings"


class Vocabulary(Struct, frozen=True):
    """The names of a model's input embedding and output head; None where one is not there."""

    embedding: str | None = None
    head: str | None = None


class Rows(Struct, frozen=True):
    """What does not agree. `head`: rows of a head that has others than the embedding, else None.
    `stated`: dotted paths in the config that state another size -> that size."""

    rows: int
    head: int | None
    stated: Mapping[str, int]

    @property
    def agree(self) -> bool:
        """Whether nothing disagrees."""
        return self.head is None and not self.stated


def vocabulary(matrices: Container[str]) -> Vocabulary:
    """The first of the known pairs of which both are among the names of matrices, or else of which
    the embedding is."""
    alone = Vocabulary()
    for head, embedding in ties.HEADS:
        if embedding in matrices and head in matrices:
            return Vocabulary(embedding, head)
        if embedding in matrices and alone.embedding is None:
            alone = Vocabulary(embedding)
    return alone


def rows_of(embedding: Shape, head: Shape | None, config: Mapping[str, Any]) -> Rows:
    """The vocabulary's rows, compared with the head's and the config's; models whose embedding has
    spare rows are not checked."""
    rows = embedding[0]
    if any(level.get("model_type") in SPARE_ROWS for level in levels(config)):
        return Rows(rows, None, {})
    paths = zip(stating_levels(config), levels(config), strict=True)
    stated = {
        f"{path}vocab_size": level["vocab_size"]
        for path, level in paths
        if level.get("vocab_size", rows) != rows
    }
    other = None if head is None or head[0] == rows else head[0]
    return Rows(rows, other, stated)


def rows_in(shapes: Mapping[str, Shape], config: Mapping[str, Any]) -> Rows | None:
    """The same of the tensors of a model; None where no embedding is known among them."""
    found = vocabulary({name for name, shape in shapes.items() if len(shape) == 2})
    if found.embedding is None:
        return None
    head = None if found.head is None else shapes[found.head]
    return rows_of(shapes[found.embedding], head, config)


def schema_with_ties(
    schema: Schema, entries: Mapping[str, Entry], equal: Callable[[Entry, Entry], bool] | None
) -> Schema:
    """The schema of a base whose config says nothing of ties, with what its values say.

    Where it stores head and embedding, equal ones are one tensor to the classes that are silent
    (Falcon, some Gemma): transformers ties by default.
    """
    if equal is None or says_tied(schema.config) or says_untied(schema.config):
        return schema
    found = vocabulary({name for name, entry in entries.items() if len(entry.spec.shape) == 2})
    if found.embedding is None or found.head is None:
        return schema
    if not equal(entries[found.head], entries[found.embedding]):
        return schema
    return Schema(schema.specs, {**schema.config, _TIE: True})
