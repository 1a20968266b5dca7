"""The result of reading a torch.save file: plain data, tensors as byte ranges, inert records.

None of these classes does anything when it is built, compared or dropped. A call in a file that
reshard does not know becomes an `Opaque`: the name that it calls, and the arguments.
"""

from __future__ import annotations

from msgspec import Struct

from reshard.core.dtypes import DType
from reshard.core.tensors import Box, Extent, Fragment, Record, whole
from reshard.errors import PlanError


class Global(Struct, frozen=True):
    """A dotted name that a pickle mentions (`torch.optim.adamw.AdamW`). It is never looked up."""

    name: str


class Opaque(Struct, eq=False):
    """Something a pickle asks to be built and that reshard does not build.

    `name` is the dotted name of the class or function, `args` what it was to be called with,
    `state` what was to become its attributes (None: nothing; most often a dict), `items` what was
    to be appended to it, or the `(key, value)` pairs to be set in it (None: nothing). `reason`
    says why a tensor is not a `TensorRef`, where `name` does not. Compared and hashed by
    identity; may hold itself in `state` or `items`.
    """

    name: str
    args: tuple[object, ...] = ()
    state: object = None
    items: list[object] | None = None
    reason: str | None = None

    def __repr__(self) -> str:
        # The contents may be large, deep or cyclic.
        return f"<Opaque {self.name}>"

    @property
    def short_name(self) -> str:
        """The class or function without its module."""
        return self.name.rpartition(".")[2]

    @property
    def is_tensor(self) -> bool:
        """Whether it would be a tensor, of a kind that is not supported."""
        return self.reason is not None or self.name.startswith("torch._utils._rebuild_")

    def describe(self) -> str:
        """What this is, for a message: `"a sparse tensor"`, `"a record of numpy.dtype"`."""
        return self.reason or _KINDS.get(self.name) or f"a record of {self.name}"


class Shared(Opaque, eq=False):
    """An `Opaque` that stands for all that equal it, and that nothing more is set in."""


class Instance(Struct, frozen=True, eq=False, gc=False):
    """What an `Opaque` says of an object without arguments whose state is a dict of strings,
    numbers, sizes and constants: the keys, which all such records share, and its values.

    Only the reader of bare pickles makes them, for who asks for them.
    """

    name: str
    keys: tuple[str, ...]
    values: tuple[object, ...]


_KINDS = {
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_sparse_csr_tensor": "a sparse tensor",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_qtensor": "a quantized tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a meta tensor, which has no data",
    "torch._utils._rebuild_xla_tensor": "a tensor stored as a numpy array",
    "torch._utils._rebuild_device_tensor_from_numpy": "a tensor stored as a numpy array",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "a tensor of a special device",
}


class Storage(Struct, frozen=True):
    """A storage: the bytes `extent` of the file, under `key` in its torch.save stream.

    `dtype` is None for an untyped storage, and for a type that reshard does not handle; `reason`
    then says which.
    """

    key: str
    dtype: DType | None
    extent: Extent
    reason: str | None = None


class TensorRef(Struct, frozen=True):
    """A tensor whose elements lie in the file, none of them read.

    `extent` goes exactly from the first to the last element used, whatever else the storage
    holds. `strides` (elements, one a dimension) is None where the elements lie in row-major order
    without gaps; an expanded dimension has stride 0. `storage` is the storage's key and the byte
    of the file where the tensor begins: two tensors of one stream with equal `storage`, `dtype`,
    `shape` and `strides` are the same weights.
    """

    dtype: DType
    shape: tuple[int, ...]
    extent: Extent
    strides: tuple[int, ...] | None
    storage: tuple[str, int]
    requires_grad: bool = False

    def fragment(self, box: Box | None = None) -> Fragment:
        """This tensor as the part `box` of a catalog's tensor; by default, as all of it.

        The box's sizes may differ from `shape` where the elements are contiguous and as many.
        Raises `PlanError` where the box does not hold this tensor's elements.
        """
        box = whole(self.shape) if box is None else box
        reshaped = box.sizes != self.shape
        if reshaped and (self.strides is not None or box.numel != whole(self.shape).numel):
            raise PlanError(
                f"a tensor of shape {self.shape} cannot fill a box of sizes {box.sizes}.",
                path=self.extent.file.path,
            )
        return Fragment(box, self.extent, self.dtype, self.strides)


class Pickled(Struct, frozen=True):
    """A bare pickle. `value` and `opaque` are as in `TorchFile`."""

    value: object
    opaque: tuple[str, ...]


class TorchFile(Struct, frozen=True):
    """One torch.save stream.

    `value` is what was saved: dict, list, tuple, str, bytes, int, float, bool and None as such
    (an OrderedDict is a dict, a torch.Size a tuple, a set a list), `DType`, `TensorRef`,
    `Storage`, `Global`, and `Opaque` for all else. Its dicts, lists and tuples are not
    nested deeper than `limits.MAX_DEPTH`, an Opaque's contents may be; either may hold itself, so
    walk only what is known.
    `records` are the checksums of the storages that `value` names, `opaque` the sorted names that
    are not understood, `warnings` harmless findings. `written_as` is the name that the file had
    when torch wrote it, without its suffix: a zip container keeps it (`archive` where torch wrote
    to a stream), a legacy one does not (None).
    """

    value: object
    records: tuple[Record, ...]
    opaque: tuple[str, ...]
    warnings: tuple[str, ...]
    written_as: str | None = None
