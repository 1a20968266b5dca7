"""What one rank's file says about a distributed tensor, and how to read it from records."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

from reshard.containers.torch import Opaque, TensorRef
from reshard.core.dtypes import DType
from reshard.core.tensors import Box, Shape, is_shape
from reshard.errors import FormatError, brief

#: Ranks of a mesh. The largest runs have tens of thousands.
MAX_RANKS = 1 << 20


class LocalFragment(Struct, frozen=True):
    """A box of the whole tensor and the bytes that hold it."""

    box: Box
    tensor: TensorRef


class Local(Struct, frozen=True):
    """One rank's part of a distributed tensor.

    `shape` is that of the whole tensor. `layout` says how it lies over the ranks, in words of
    `kind`; all ranks' files state the same. `world` is the number of ranks of the run as far as
    the file states it, `rank` the rank that it says wrote it; None where it does not say.
    """

    kind: str
    dtype: DType
    shape: Shape
    fragments: tuple[LocalFragment, ...]
    layout: tuple[object, ...]
    world: int | None = None
    rank: int | None = None


class Place(Struct, frozen=True):
    """Where a value occurs: the file, and the tensor's name."""

    path: str
    tensor: str

    def broken(self, message: str) -> FormatError:
        """The error of a file that contradicts itself or what torch writes."""
        return FormatError(
            message,
            path=self.path,
            tensor=self.tensor,
            hint="The file is damaged, or another version of torch wrote it.",
        )


def attributes(value: object, place: Place) -> Mapping[object, object]:
    """The attributes that an object was to get: of a dict, or of (dict, slots)."""
    state = value.state if isinstance(value, Opaque) else None
    if isinstance(state, tuple) and len(state) == 2:
        found: dict[object, object] = {}
        for half in state:
            found.update(half if isinstance(half, dict) else {})
        return found
    if isinstance(state, dict):
        return state
    what = value.describe() if isinstance(value, Opaque) else brief(value)
    raise place.broken(f"{what} has no attributes.")


def shape_of(value: object, place: Place) -> Shape:
    """A shape that an object states."""
    if not isinstance(value, tuple | list) or not is_shape(value):
        raise place.broken(f"{brief(value)} is not a shape.")
    return tuple(value)


def whole_shape(value: Opaque, place: Place) -> tuple[DType, Shape]:
    """Element type and shape of the whole tensor: `_rebuild_wrapper_subclass(cls, dtype, size,
    ...)`."""
    if len(value.args) < 3 or not isinstance(value.args[1], DType):
        raise place.broken("it does not say of what type and shape the whole tensor is.")
    return value.args[1], shape_of(value.args[2], place)


def natural(value: object) -> bool:
    """Whether a file's value is a number of a rank, dimension or size."""
    return type(value) is int and 0 <= value < 1 << 62
