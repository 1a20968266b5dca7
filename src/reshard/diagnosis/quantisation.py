"""What a model folder's weights are made of: numbers, or codes with scales; and what is wrong."""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np
from msgspec import Struct, field
from msgspec.structs import replace

from reshard.core.tensors import Entry, flat
from reshard.diagnosis.folder import Folder
from reshard.errors import ReshardError
from reshard.naming.quantised import (
    Numbers,
    Refused,
    Statement,
    numbers,
    refused,
    stale_scales,
    statement,
    without_codes,
)
from reshard.storage.local import Sources
from reshard.transfer.checksums import Ledger
from reshard.transfer.fill import Reader, fill

# Elements of a weight that are examined.
_SAMPLE = 64 << 10
# Codes fill the range of their type, up to 448, far above the weights of language models.
_LARGE = 64.0


class Quantisation(Struct, frozen=True):
    """What was found of codes and scales.

    stated: what the config says. numbers: the tensors, where codes are read as numbers.
    unread: the kind of codes that are not. fault: why the codes could not be read.
    stale: weight that is not a code -> the scale beside it. cast: those of them that hold the codes
    themselves, cast to another dtype.
    """

    stated: Statement | None = None
    numbers: Numbers | None = None
    unread: Refused | None = None
    fault: str = ""
    stale: Mapping[str, str] = field(default_factory=dict)
    cast: tuple[str, ...] = ()

    @property
    def kinds(self) -> Mapping[str, str]:
        """Tensor -> the kind of its codes, of those that are read."""
        return {} if self.numbers is None else self.numbers.kinds


def examine(folder: Folder, sources: Sources) -> tuple[Folder, Quantisation]:
    """The folder with its quantised weights as numbers, without scales and without codes that
    are not read, and what was found of them."""
    stated = statement(folder.settings)
    entries = folder.entries
    unread = refused(entries, stated)
    if unread is not None:
        kept = without_codes(entries, unread)
        return replace(folder, entries=kept), Quantisation(stated, unread=unread)
    stale = stale_scales(entries)
    scales = frozenset(stale.values())
    left = {name: e for name, e in entries.items() if name not in scales} if scales else entries
    try:
        found = numbers(left, folder.settings)
    except ReshardError as error:
        return replace(folder, entries=left), Quantisation(
            stated, fault=str(error), stale=stale, cast=_cast(entries, stale, sources)
        )
    quantisation = Quantisation(stated, found, stale=stale, cast=_cast(entries, stale, sources))
    return replace(folder, entries=found.entries), quantisation


def _cast(
    entries: Mapping[str, Entry], stale: Mapping[str, str], sources: Sources
) -> tuple[str, ...]:
    """The weights whose first elements are all numbers of float8, and large ones."""
    reader = Reader(sources, Ledger(()), memoryview(bytearray(_SAMPLE * 8)))
    found = []
    for name in stale:
        entry = entries[name]
        numel = entry.spec.numel
        sample = np.empty(min(_SAMPLE, numel), np.float32)
        if not numel:
            continue
        fill(entry, flat(numel, 0, len(sample)), sample, reader)
        with np.errstate(invalid="ignore", over="ignore"):
            rounded = sample.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
        if np.array_equal(rounded, sample) and np.abs(sample).max() > _LARGE:
            found.append(name)
    return tuple(found)
