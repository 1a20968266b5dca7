"""What a pickle says, by Python's own unpickler in which nothing is looked up or called.

Only plain data is compared: dicts, lists, tuples, text, bytes, numbers. In place of a global stands
a class of ours that keeps what it is called with.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

from reshard.containers.torch import Global, Opaque

_MAX_VALUES = 20_000


class _Called:
    """What a global, or the result of a call, stands for."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.arguments = arguments

    def __call__(self, *arguments: Any, **named: Any) -> _Called:
        return _Called(*arguments)

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, item: Any) -> None:
        """What a subclass of list has."""

    def extend(self, items: Any) -> None:
        """And this."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """What a subclass of dict has."""


class _Unpickler(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _Called

    def persistent_load(self, pid: Any) -> Any:
        return _Called()

    def get_extension(self, code: int) -> Any:
        raise pickle.UnpicklingError


def value_of(data: bytes) -> Any:
    """The pickle's value. Raises anything where it is not a pickle."""
    return _Unpickler(io.BytesIO(data)).load()


def check_same(found: object, known: object) -> None:
    """Compare plain data, wherever both have it."""
    todo = [(found, known)]
    for _ in range(_MAX_VALUES):
        if not todo:
            return
        mine, theirs = todo.pop()
        if isinstance(theirs, _Called) or isinstance(mine, Opaque | Global):
            continue
        if isinstance(theirs, dict):
            assert isinstance(mine, dict), (mine, theirs)
            plain = {key for key in theirs if isinstance(key, str | int | bytes)}
            assert plain <= mine.keys(), (plain, mine.keys())
            todo += [(mine[key], theirs[key]) for key in plain]
        elif isinstance(theirs, set | frozenset):
            assert isinstance(mine, list), (mine, theirs)
        elif isinstance(theirs, list | tuple):
            assert isinstance(mine, type(theirs)), (mine, theirs)
            assert len(mine) == len(theirs), (mine, theirs)
            todo += list(zip(mine, theirs, strict=True))
        elif isinstance(theirs, bytearray):
            assert mine == bytes(theirs)
        elif isinstance(theirs, str):
            assert mine == theirs or "\\" in str(mine), (mine, theirs)
        elif isinstance(theirs, float) and theirs != theirs:
            assert mine != mine
        else:
            assert type(mine) is type(theirs), (mine, theirs)
            assert mine == theirs, (mine, theirs)
