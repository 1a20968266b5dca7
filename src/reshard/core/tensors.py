"""Tensors as byte ranges: which elements of a tensor lie in which bytes of which file.

A tensor is an `Entry`: its name, dtype and shape, and the `Fragment`s that hold its elements. A
fragment says *which* elements by a `Box` and *where* by an `Extent`. Everything in this module is
plain data and pure functions; nothing opens a file.

    tensor [4, 6] over two ranks           box of rank 1                extent of rank 1
    FSDP, rows:      0 0 0 0 0 0           shape (4, 6)                 rank1.distcp
                     0 0 0 0 0 0           offsets (2, 0)               [offset, offset + 12 * item)
                     1 1 1 1 1 1           sizes (2, 6)
                     1 1 1 1 1 1
    ZeRO, flat:      0 ... 0 1 ... 1       shape (24,) offsets (13,)    zero_pp_rank_1_...pt
                                           sizes (11,)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, Protocol

from msgspec import Struct
from msgspec.structs import replace

from reshard.core.dtypes import FLOAT32, DType
from reshard.errors import FormatError

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

Shape = tuple[int, ...]
# Dimensions: numpy 1 has no more (numpy 2 and torch: 64). Without a limit the product of a long
# shape's sizes alone would take minutes.
MAX_DIMS = 32
# Elements, sizes and offsets, exclusive: none is a tensor's, and their sums stay in 64 bits.
MAX_NUMEL = 1 << 62
# Characters of a name, and dots in it: those of models have 200 and 20. Names are compared with
# patterns and with each other, in time that grows with the square of their parts.
MAX_NAME, MAX_DOTS = 512, 128
TensorKind = Literal["parameter", "buffer", "frozen", "tied"]


class TensorSpec(Struct, frozen=True, gc=False):
    """A tensor's name, element type and shape."""

    name: str
    dtype: DType
    shape: Shape

    def __post_init__(self) -> None:
        """Raise `FormatError` for a name that is longer than any."""
        if len(self.name) > MAX_NAME or self.name.count(".") > MAX_DOTS:
            raise FormatError(
                f"its name has {len(self.name)} characters and {self.name.count('.')} dots; "
                f"reshard reads at most {MAX_NAME} and {MAX_DOTS}.",
                tensor=self.name,
            )

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class FileRef(Struct, frozen=True, gc=False):
    """A file of the checkpoint and how to open it; extents count in what opening gives.

    `path` is absolute. `codec` is None for a plain file; otherwise bytes
    `[frame_offset, frame_offset + frame_nbytes)` of the file are one frame of that compression
    (`"zstd"`), and an extent's offset counts in the decompressed bytes.
    """

    path: str
    codec: str | None = None
    frame_offset: int = 0
    frame_nbytes: int = 0


class Extent(Struct, frozen=True, gc=False):
    """Bytes `[offset, offset + nbytes)` of a file."""

    file: FileRef
    offset: int
    nbytes: int


class Record(Struct, frozen=True, gc=False):
    """A stretch of a file whose CRC-32 the file itself states (an entry of a zip archive)."""

    extent: Extent
    crc32: int


class Read(Protocol):
    """Reads elements of a tensor, cast to `dtype`, as an array of the box's sizes."""

    def __call__(self, entry: Entry, box: Box, dtype: DType = FLOAT32, /) -> Array: ...


class Computed(Struct, frozen=True):
    """An array that arithmetic makes of stored tensors, block by block, in float32.

    The one protocol of such arrays; `core/arithmetic.py` has them. The geometry treats it as a file
    that holds the array's elements in row-major order: a `Portion` counts in those bytes, so that a
    computed tensor is cut, joined and transposed like a stored one.
    """

    @property
    def shape(self) -> Shape:
        """The array's shape."""
        raise NotImplementedError

    @property
    def inputs(self) -> tuple[Entry, ...]:
        """The tensors that it is made of."""
        raise NotImplementedError

    @property
    def piece_numel(self) -> int:
        """How many elements are best computed at once."""
        raise NotImplementedError

    def values(self, box: Box, read: Read) -> Array:
        """The elements of `box` (over `shape`) in float32, as an array of the box's sizes."""
        raise NotImplementedError


class Portion(Struct, frozen=True):
    """Bytes `[offset, offset + nbytes)` of a computed array's float32 elements, row-major."""

    source: Computed
    offset: int
    nbytes: int


class Box(Struct, frozen=True, gc=False):
    """Elements `[offsets, offsets + sizes)` of a row-major array of `shape`.

    `shape` is the tensor's own shape, or `(numel,)`: then the box is a range of the flattened
    tensor, as ZeRO partitions and FSDP1 flat parameters are.
    """

    shape: Shape
    offsets: Shape
    sizes: Shape

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    def intersect(self, other: Box) -> Box | None:
        """The elements in both boxes, or None. Both must be over the same `shape`.

        >>> Box((10,), (0,), (6,)).intersect(Box((10,), (4,), (6,)))
        Box(shape=(10,), offsets=(4,), sizes=(2,))
        """
        offsets, sizes = [], []
        for a, m, b, n in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True):
            start = max(a, b)
            size = min(a + m, b + n) - start
            if size <= 0:
                return None  # of 20,000 fragments, most are found to be elsewhere by one dimension
            offsets.append(start)
            sizes.append(size)
        return Box(self.shape, tuple(offsets), tuple(sizes))


def is_shape(sizes: Sequence[object]) -> bool:
    """Whether a file's numbers are the shape of a tensor: few, natural, of a possible product.

    >>> is_shape([4, 0]), is_shape([-1]), is_shape([1 << 32, 1 << 32])
    (True, False, False)
    """
    if len(sizes) > MAX_DIMS:
        return False
    numel = 1
    for size in sizes:
        if type(size) is not int or not 0 <= size < MAX_NUMEL:
            return False
        # A size of 0 must not hide an impossible one.
        numel *= max(size, 1)
    return numel < MAX_NUMEL


@lru_cache(maxsize=4096)
def whole(shape: Shape) -> Box:
    """The box that holds every element of `shape`; one for all tensors of that shape."""
    return Box(shape, (0,) * len(shape), shape)


def flat(numel: int, start: int, length: int) -> Box:
    """Elements `[start, start + length)` of a tensor of `numel` elements, flattened row-major."""
    return Box((numel,), (start,), (length,))


class Fragment(Struct, frozen=True, gc=False):
    """A part of a tensor: the elements of `box` lie in `extent` as `dtype`.

    `strides` (elements, one for each dimension of the box) is None where the elements lie in
    row-major order without gaps; element `i` (relative to the box) then lies at
    `extent.offset + sum(i * strides) * dtype.itemsize`.
    """

    box: Box
    extent: Extent | Portion
    dtype: DType
    strides: Shape | None = None

    @property
    def in_file(self) -> Extent:
        """The file's bytes of a stored fragment. Raises `TypeError` for a computed one."""
        if not isinstance(self.extent, Extent):
            raise TypeError("the fragment is computed, and lies in no file")
        return self.extent


class Fragments(Struct, frozen=True):
    """Fragments of a tensor, stored and contiguous, that arithmetic makes for those who ask.

    `core/partition.py` implements this protocol. The fragments are ranges of the flattened tensor,
    in ascending order.
    """

    @property
    def over(self) -> Shape:
        """The shape that the fragments' boxes are over."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        raise NotImplementedError

    @property
    def longest(self) -> int:
        """Bytes of the longest, at most."""
        raise NotImplementedError

    def regions(self) -> Regions:
        """What the fragments lie in; one object for all that lie in the same."""
        raise NotImplementedError

    def within(self, start: int, stop: int) -> Iterator[Fragment]:
        """Those that hold elements `[start, stop)` of the flattened tensor."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[Fragment]:
        raise NotImplementedError

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, index: int) -> Fragment:
        return next(islice(self, index, None))


class Single(Fragments, frozen=True, gc=False, eq=False):
    """The one fragment of a tensor that lies whole in a file, row-major and in its own dtype.

    Most tensors lie so. A tuple, a `Fragment` and an `Extent` would take 110 bytes more. It equals
    the tuple of its fragment.
    """

    file: FileRef
    offset: int
    box: Box
    dtype: DType

    @property
    def over(self) -> Shape:
        return self.box.shape

    @property
    def nbytes(self) -> int:
        return self.box.numel * self.dtype.itemsize

    @property
    def longest(self) -> int:
        return self.nbytes

    def regions(self) -> Single:
        return self

    def extents(self) -> Iterator[Extent]:
        yield Extent(self.file, self.offset, self.nbytes)

    def within(self, start: int, stop: int) -> Iterator[Fragment]:
        return iter(self)

    def __iter__(self) -> Iterator[Fragment]:
        yield Fragment(self.box, Extent(self.file, self.offset, self.nbytes), self.dtype)

    def __len__(self) -> int:
        return 1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, tuple | Single) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))


class Regions(Protocol):
    """Stretches of files that the fragments of many tensors are cut out of."""

    def extents(self) -> Iterator[Extent]:
        """The stretches."""


def stored(fragments: Iterable[Fragment]) -> Iterator[Extent]:
    """The files' bytes that fragments are made of: their own, or those behind computed ones."""
    for fragment in fragments:
        if isinstance(fragment.extent, Extent):
            yield fragment.extent
        else:
            for entry in fragment.extent.source.inputs:
                yield from stored(entry.fragments)


def nbytes_read(fragments: tuple[Fragment, ...] | Fragments) -> int:
    """Bytes of files that reading the fragments takes; of a part of a computed array, its share."""
    if isinstance(fragments, Fragments):
        return fragments.nbytes
    total = 0
    for fragment in fragments:
        nbytes = sum(extent.nbytes for extent in stored([fragment]))
        if isinstance(fragment.extent, Portion):
            numel = math.prod(fragment.extent.source.shape)
            nbytes = nbytes * fragment.box.numel // max(numel, 1)
        total += nbytes
    return total


class Entry(Struct, frozen=True, gc=False):
    """A tensor of a catalog. Its fragments' boxes tile it exactly: `tiling.check_tiling` proves it.

    All boxes of one entry are over the same shape: the tensor's, or `(numel,)`. `aliases` are
    the other names of the same weights: tied parameters, and names that loaded models have.
    """

    spec: TensorSpec
    fragments: tuple[Fragment, ...] | Fragments
    kind: TensorKind = "parameter"
    aliases: tuple[str, ...] = ()

    @property
    def over(self) -> Shape:
        """The shape that its fragments' boxes are over: its own, or `(numel,)`."""
        if isinstance(self.fragments, Fragments):
            return self.fragments.over
        return self.fragments[0].box.shape if self.fragments else self.spec.shape

    @property
    def names(self) -> tuple[str, ...]:
        """Its name and all others."""
        return (self.spec.name, *self.aliases)

    def renamed(self, name: str) -> Entry:
        """The same tensor under another name."""
        if name == self.spec.name:
            return self
        return replace(self, spec=replace(self.spec, name=name))

    def aliased(self, aliases: tuple[str, ...]) -> Entry:
        """The same tensor with these other names."""
        if aliases == self.aliases:
            return self
        return replace(self, aliases=aliases)


#: Whether two tensors of one shape hold the same values; reads them, in a stream.
Equal = Callable[[Entry, Entry], bool]


def main_dtype(specs: Iterable[TensorSpec]) -> DType | None:
    """The dtype that a model is said to have: that of most elements.

    Only floating types wider than a byte count, where there are any; None where there is no tensor.
    """
    numel: Counter[DType] = Counter()
    for spec in specs:
        numel[spec.dtype] += spec.numel
    counted = [d for d in numel if d.floating and d.itemsize > 1] or list(numel)
    return max(counted, key=lambda dtype: numel[dtype], default=None)
