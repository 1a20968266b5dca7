"""The plan of a conversion: which files, with which literal bytes, and what fills the slots.

A plan is pure data, made before anything is written. A format's `lay_out` makes the output files;
this module holds the types and what every layout shares.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from msgspec import Struct

from reshard.core.catalog import Asset
from reshard.core.findings import Finding
from reshard.core.packed import Packed
from reshard.core.tensors import Entry, TensorSpec, nbytes_read
from reshard.errors import OptionError

#: Small files by their names, and large ones whose bytes are known.
Texts = tuple[tuple[str, bytes | Packed], ...]


class Slot(Struct, frozen=True, gc=False):
    """The place of a tensor (or of a chunk of one) in an output file.

    `spec` is what is written: its name, output dtype and shape; `source` holds the same elements
    as they lie in the checkpoint. The engine writes the tensor's row-major bytes at `offset`, and
    their CRC-32, four bytes little-endian, at each of `crcs`, which are distances from `offset`:
    tensors of one shape share them. `reference`, where given, is
    the base model's tensor, to see whether the values changed.
    """

    offset: int
    spec: TensorSpec
    source: Entry
    crcs: tuple[int, ...] = ()
    reference: Entry | None = None

    @property
    def crc_offsets(self) -> tuple[int, ...]:
        """Where in the file the CRC-32 belongs."""
        return tuple([self.offset + distance for distance in self.crcs])


class OutputFile(Struct, frozen=True):
    """A file of the output: `nbytes` long, `literals` at their offsets, tensors in the slots.

    Literals and slots tile the file; slots are in ascending order of offset. Tensors of one name
    in files of one `table` are chunks of one tensor; `table` is empty for the model itself.
    """

    name: str
    nbytes: int
    literals: Sequence[tuple[int, bytes]]
    slots: tuple[Slot, ...]
    table: str = ""


class Plan(Struct, frozen=True):
    """Everything that will be written: tensor files, small files with known bytes, and copies."""

    files: tuple[OutputFile, ...]
    texts: Texts = ()
    assets: tuple[Asset, ...] = ()
    findings: tuple[Finding, ...] = ()

    def slots(self) -> Iterator[Slot]:
        """Every slot, in the order it is written."""
        for file in self.files:
            yield from file.slots

    @property
    def bytes_to_read(self) -> int:
        return sum(nbytes_read(slot.source.fragments) for slot in self.slots())

    @property
    def bytes_to_write(self) -> int:
        return sum(file.nbytes for file in self.files)


def pack(specs: Sequence[TensorSpec], max_nbytes: int) -> list[list[TensorSpec]]:
    """Distribute tensors over shards of at most `max_nbytes` bytes, in order.

    The rule of `huggingface_hub.split_torch_state_dict_into_shards` (2.4, serialization/_base.py):
    a tensor larger than a shard gets one of its own, and does not close the shard being filled.
    """
    shards: list[list[TensorSpec]] = []
    current: list[TensorSpec] = []
    size = 0
    for spec in specs:
        if spec.nbytes > max_nbytes:
            shards.append([spec])
            continue
        if size + spec.nbytes > max_nbytes:
            shards.append(current)
            current, size = [], 0
        current.append(spec)
        size += spec.nbytes
    if current:
        shards.append(current)
    return shards


_UNITS = {"TB": 10**12, "GB": 10**9, "MB": 10**6, "KB": 10**3,
          "TIB": 2**40, "GIB": 2**30, "MIB": 2**20, "KIB": 2**10, "B": 1,
          "T": 10**12, "G": 10**9, "M": 10**6, "K": 10**3}  # fmt: skip


def parse_size(text: str | int) -> int:
    """Bytes from `"5GB"` or `"5G"` (decimal units, as Hugging Face counts), `"5GiB"`, a number.

    Raises `OptionError`.

    >>> parse_size("5GB")
    5000000000
    """
    if isinstance(text, int):
        size = text
    elif not isinstance(text, str):
        raise OptionError(
            f"{text!r} is not a size.", hint="Write a whole number of bytes, or a size like 5GB."
        )
    else:
        upper = text.strip().upper()
        unit = next((unit for unit in _UNITS if upper.endswith(unit)), "")
        try:
            size = int(float(upper.removesuffix(unit)) * _UNITS.get(unit, 1))
        except (ValueError, OverflowError):
            raise OptionError(
                f"{text!r} is not a size.", hint="Write it like 5GB or 500MB."
            ) from None
    if size <= 0:
        raise OptionError(f"a size must be positive, {text!r} is not.")
    return size
