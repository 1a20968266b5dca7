"""Handlers for the few calls that are executed: pure functions from data to data.

Chosen by the dotted name that the pickle states. What torch 2.13 writes, and what it still reads of
older versions, stands in torch/_utils.py, torch/_tensor.py and torch/serialization.py.

A handler gets the call's arguments as they lie on the stack. It returns a value; or
NotImplemented, and the machine records the call; or it raises `Malformed` where the arguments
contradict the file or themselves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from msgspec.structs import replace

from reshard.containers.torch.limits import MAX_NAME
from reshard.containers.torch.machine import Handler
from reshard.containers.torch.malformed import Malformed, show
from reshard.containers.torch.records import Global, Opaque, Storage, TensorRef
from reshard.core.dtypes import DType
from reshard.core.strides import contiguous_strides
from reshard.core.tensors import MAX_DIMS, Extent

_MAX_NBYTES = 1 << 63
# Elements of an expanded tensor: a mask of 32,768 by 32,768. Without a limit a file of a kilobyte
# would give an output of petabytes.
_MAX_REPEATED = 1 << 30


# Tensors.


def _tensor(args: tuple[object, ...]) -> object:
    """`_rebuild_tensor(storage, storage_offset, size, stride)`: torch before 0.4."""
    storage, offset, size, stride = _exactly(args, 4)
    return _make(storage, None, offset, size, stride, False)


def _tensor_v2(args: tuple[object, ...]) -> object:
    """`_rebuild_tensor_v2(storage, storage_offset, size, stride, requires_grad, hooks[, bits])`."""
    storage, offset, size, stride, grad, _, bits = _between(args, 6, 7)
    return _make(storage, None, offset, size, stride, grad, bits)


def _tensor_v3(args: tuple[object, ...]) -> object:
    """`_rebuild_tensor_v3(storage, …, requires_grad, hooks, dtype[, bits])`: no typed storage."""
    storage, offset, size, stride, grad, _, dtype, bits = _between(args, 7, 8)
    return _make(storage, dtype, offset, size, stride, grad, bits)


def _parameter(args: tuple[object, ...]) -> object:
    """`_rebuild_parameter(tensor, requires_grad, hooks)`: the tensor."""
    tensor, grad, _ = _exactly(args, 3)
    if isinstance(tensor, TensorRef):
        return replace(tensor, requires_grad=grad is True)
    return tensor


def _parameter_with_state(args: tuple[object, ...]) -> object:
    """`_rebuild_parameter_with_state(tensor, requires_grad, hooks, state)`: the tensor."""
    tensor, grad, hooks, _ = _exactly(args, 4)
    return _parameter((tensor, grad, hooks))


def _from_type(args: tuple[object, ...]) -> object:
    """`_rebuild_from_type_v2(function, class, args, state)`: a tensor with attributes.

    A plain tensor or parameter is the tensor itself, and its attributes are dropped. Of another
    class (DTensor, ShardedTensor, a user's) it is an `Opaque` of that class; its `args` are then
    the plain tensor, or what the function would have been given.
    """
    function, cls, inner, state = _exactly(args, 4)
    if not isinstance(function, Global) or not isinstance(cls, Global):
        raise Malformed("a tensor's class is not a name")
    if not isinstance(inner, tuple):
        raise Malformed("the arguments of a call are not a tuple")
    rebuild = _REBUILD.get(function.name)
    if rebuild is not None:
        tensor = rebuild(inner)
        if cls.name in _PLAIN_CLASSES:
            return tensor
        inner = (tensor,)
    return Opaque(cls.name, inner, state, reason=f"a tensor of class {cls.name}")


def _make(
    storage: object,
    dtype: object,
    offset: object,
    size: object,
    stride: object,
    requires_grad: object,
    bits: object = None,
) -> TensorRef | Opaque:
    """A tensor of `storage`, checked to lie inside it. `offset` and `stride` count elements."""
    if not isinstance(storage, Storage):
        raise Malformed("a tensor's storage is not a storage")
    dtype = storage.dtype if dtype is None else dtype
    reason = _not_handled(storage, dtype, bits)
    if reason is not None or not isinstance(dtype, DType):
        return Opaque("torch.Tensor", (storage, dtype, offset, size, stride), reason=reason)
    shape, strides = _naturals(size, "size"), _naturals(stride, "stride")
    (first,) = _naturals((offset,), "storage offset")
    if len(shape) != len(strides):
        raise Malformed(f"a tensor has {len(shape)} sizes and {len(strides)} strides")
    numel = math.prod(shape)
    span = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if numel else 0
    if numel * dtype.itemsize >= _MAX_NBYTES or (first + span) * dtype.itemsize >= _MAX_NBYTES:
        raise Malformed(f"a tensor of shape {shape} is larger than any file")
    begin, end = first * dtype.itemsize, (first + span) * dtype.itemsize
    if span and end > storage.extent.nbytes:
        raise Malformed(
            f"a tensor takes bytes {begin} to {end} of storage {storage.key!r}, which has "
            f"{storage.extent.nbytes}"
        )
    if numel > max(span, _MAX_REPEATED):
        reason = f"a tensor of shape {shape} that repeats {span} elements"
        return Opaque("torch.Tensor", (storage, dtype, offset, size, stride), reason=reason)
    whole = storage.extent
    return TensorRef(
        dtype=dtype,
        shape=shape,
        extent=Extent(whole.file, whole.offset + (begin if span else 0), end - begin),
        strides=None if not numel or _is_contiguous(shape, strides) else strides,
        storage=(storage.key, whole.offset + begin),
        requires_grad=requires_grad is True,
    )


def _not_handled(storage: Storage, dtype: object, bits: object) -> str | None:
    if isinstance(dtype, Global):
        return f"a tensor of dtype {dtype.name}"
    if dtype is None:
        return storage.reason or "a tensor without dtype"
    if bits and (not isinstance(bits, dict) or any(bits.values())):
        return "a tensor whose conjugate or negative bit is set"
    return None


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    plain = contiguous_strides(shape)
    return all(n == 1 or have == want for n, have, want in zip(shape, strides, plain, strict=True))


def _naturals(values: object, what: str) -> tuple[int, ...]:
    if not isinstance(values, tuple | list):
        raise Malformed(f"a tensor's {what} is a {type(values).__name__}")
    if len(values) > MAX_DIMS:
        raise Malformed(f"a tensor has {len(values)} dimensions")
    result: list[int] = []
    for value in values:
        if type(value) is not int or not 0 <= value < _MAX_NBYTES:
            raise Malformed(f"a tensor's {what} is {show(value)}")
        result.append(value)
    return tuple(result)


def _exactly(args: tuple[object, ...], count: int) -> tuple[object, ...]:
    if len(args) != count:
        raise Malformed(f"a call has {len(args)} arguments and takes {count}")
    return args


def _between(args: tuple[object, ...], least: int, most: int) -> tuple[object, ...]:
    """The arguments, filled up with None."""
    if not least <= len(args) <= most:
        raise Malformed(f"a call has {len(args)} arguments and takes {least} to {most}")
    return args + (None,) * (most - len(args))


# What lies around tensors. None of these copies what it is given: a pickle may give it often.


def _size(args: tuple[object, ...]) -> object:
    """`torch.Size(ints)`: a tuple."""
    (sizes,) = _exactly(args, 1)
    return _naturals(sizes, "size")


def _mapping(args: tuple[object, ...]) -> object:
    """`OrderedDict()`, `Counter(dict)`, `defaultdict(class)`: a dict."""
    if not args or args == (None,):
        return {}
    if len(args) > 1:
        return NotImplemented
    if isinstance(args[0], Global):
        return {}
    return args[0] if isinstance(args[0], dict) else NotImplemented


def _items(args: tuple[object, ...]) -> object:
    """`set(list)`, `frozenset(list)`, `deque((), maximum)`, `list()`: a list."""
    if not args or args[0] == ():
        return []
    return args[0] if isinstance(args[0], list) else NotImplemented


def _device(args: tuple[object, ...]) -> object:
    """`torch.device("cuda", 0)`: the string `"cuda:0"`."""
    kind, index = _between(args, 1, 2)
    if not isinstance(kind, str) or len(kind) > 32:
        return NotImplemented
    return f"{kind}:{index}" if isinstance(index, int) else kind


def _layout(args: tuple[object, ...]) -> object:
    """`_get_layout("torch.strided")`: that string."""
    (name,) = _exactly(args, 1)
    return name


def _bytes(args: tuple[object, ...]) -> object:
    """`bytes()`, and `_codecs.encode(text, "latin1")`: how protocol 2 spells bytes."""
    if not args:
        return b""
    text, encoding = _between(args, 1, 2)
    if isinstance(text, bytes):
        return text
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        return NotImplemented
    try:
        return text.encode("latin-1")
    except UnicodeEncodeError:
        raise Malformed("bytes are spelt with characters above 255") from None


def _getattr(args: tuple[object, ...]) -> object:
    """`getattr(class, "Nested")`: a longer name, looked up nowhere."""
    owner, name = _exactly(args, 2)
    if not isinstance(owner, Global) or not isinstance(name, str):
        return NotImplemented
    if len(owner.name) + len(name) >= MAX_NAME or not name.isprintable():
        raise Malformed("a global's name is longer than any name, or not text")
    return Global(f"{owner.name}.{name}")


def _integer(args: tuple[object, ...]) -> object:
    """An enumeration's member by its value (`ZeroStageEnum(2)`): the integer."""
    (value,) = _exactly(args, 1)
    return value if isinstance(value, int) else NotImplemented


_REBUILD: Mapping[str, Handler] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter_with_state,
}
_PLAIN_CLASSES = frozenset(
    {
        "torch.Tensor",
        "torch._tensor.Tensor",
        "torch.tensor.Tensor",
        "torch.nn.parameter.Parameter",
        "torch.nn.parameter.Buffer",
    }
)
HANDLERS: Mapping[str, Handler] = {
    **_REBUILD,
    "torch._tensor._rebuild_from_type": _from_type,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch.tensor._rebuild_from_type": _from_type,
    "torch.tensor._rebuild_from_type_v2": _from_type,
    "torch.Size": _size,
    "torch.device": _device,
    "torch.serialization._get_layout": _layout,
    "collections.OrderedDict": _mapping,
    "collections.Counter": _mapping,
    "collections.defaultdict": _mapping,
    "collections.deque": _items,
    "builtins.dict": _mapping,
    "builtins.list": _items,
    "builtins.set": _items,
    "builtins.frozenset": _items,
    "builtins.bytes": _bytes,
    "builtins.bytearray": _bytes,
    "builtins.getattr": _getattr,
    "_codecs.encode": _bytes,
    "deepspeed.runtime.zero.config.ZeroStageEnum": _integer,
}
