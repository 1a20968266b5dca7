"""What a conversion writes for each tensor: its dtype, its place in the order, its reference."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from msgspec import Struct
from msgspec.structs import replace

from reshard.core import dtypes
from reshard.core.tensors import Entry, TensorSpec
from reshard.errors import PlanError

#: The values of `--dtype`.
CHOICES = ("base", "keep", "float32", "bfloat16", "float16")


class OutputTensor(Struct, frozen=True, gc=False):
    """A tensor of the output: what is written, what from, and the base's tensor to compare with.

    `aliases` are the other names that the same bytes get, where the format can name them twice.
    """

    spec: TensorSpec
    source: Entry
    reference: Entry | None = None
    aliases: tuple[str, ...] = ()


def as_entries(tensors: Iterable[OutputTensor]) -> dict[str, Entry]:
    """The tensors of an output by name, each with the dtype that is written: a layout joins only
    tensors of one dtype."""
    return {tensor.spec.name: replace(tensor.source, spec=tensor.spec) for tensor in tensors}


def output_tensor(
    name: str, entry: Entry, reference: Entry | None = None, aliases: tuple[str, ...] = ()
) -> OutputTensor:
    """An entry as a tensor of the output, in its dtype."""
    return OutputTensor(replace(entry.spec, name=name), entry, reference, aliases)


def choose(
    entries: Sequence[tuple[str, Entry]], base: Mapping[str, Entry], dtype: str
) -> list[OutputTensor]:
    """The output's tensors in the order of the entries, with the dtypes that `--dtype` asks for.

    Only floating types are cast into one another; an integer tensor keeps its type, and nothing is
    cast to a type of 8 bits or less without a request. Raises `PlanError`.
    """
    return [_output_tensor(name, entry, base.get(name), dtype) for name, entry in entries]


def _output_tensor(name: str, entry: Entry, base: Entry | None, choice: str) -> OutputTensor:
    stored = entry.spec.dtype
    expected = stored
    if choice == "base" and base is not None:
        expected = base.spec.dtype
    elif choice not in ("base", "keep") and stored.floating and stored.itemsize > 1:
        expected = dtypes.parse(choice)
    if stored.is_code and not expected.is_code and expected.floating:
        raise PlanError(
            f"it is {stored} in the checkpoint, {expected} in the base model, and it has no "
            "scale: a quantised code without its scale is not a number.",
            tensor=name,
            hint="Convert the checkpoint that holds the scales; if they are numbers and not codes, "
            "cast them to bfloat16 with torch and save that.",
        )
    if not stored.rounds_to(expected):
        raise PlanError(
            f"it is {stored} in the checkpoint and {expected} in the base model, and reshard "
            "cannot round one to the other.",
            tensor=name,
            hint="Pass --dtype keep to write what the checkpoint holds.",
        )
    spec = entry.spec  # most of 200,000 tensors are written as they are: one record serves both
    if (spec.name, spec.dtype) != (name, expected):
        spec = TensorSpec(name, expected, spec.shape)
    same_shape = base is not None and base.spec.shape == spec.shape and base.spec.dtype.floating
    # Of layers that its files do not hold, the base has no values.
    held = base is not None and (base.fragments or not base.spec.numel)
    return OutputTensor(spec, entry, base if same_shape and held else None)
