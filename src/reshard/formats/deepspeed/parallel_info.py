"""`universal_checkpoint_info`: how tensor parallel ranks split the parameters of a checkpoint.

AutoTP, DeepSpeed's tensor parallel training, writes it into every model file:

    affine_map                               by parameter: which block lies where in which part
    tp_replicated_parameter_patterns         the same on every rank
    parameter_with_row_parallelism_patterns  split along dimension 1
    parameter_with_sub_params                several parameters in one, each split by itself,
    sub_param_shard_widths                   and the widths that the ranks hold of each
    vocabulary_parameter_patterns            split along dimension 0, original_vocab_size rows
    autotp_unsupported_parameter_patterns    split in a way that none of these can say
    (in no list)                             split along dimension 0

The map goes before the lists, which stand beside it for older readers. A pattern is a regular
expression for `re.match`. AutoTP's are `^`, a parameter's escaped name, and `$`; only such are
taken, so that no expression of a file is ever run.

    DeepSpeed   version
    0.18.9      0.2, 0.3   no list has the parameters that AutoTP left whole, nor those that it
                           split as the lists cannot say: "in no list" may mean anything
    0.19.6      0.4        the lists are complete
    0.19.8      0.4        with the map

Read off DeepSpeed 0.19.8 and its history: module_inject/layers.py
(collect_autotp_universal_checkpoint_info), checkpoint/affine.py, checkpoint/ds_to_universal.py
(merge_tp_slices).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct

from reshard.core.regex import regex
from reshard.core.tensors import Shape
from reshard.errors import FormatError, UnsupportedError, brief
from reshard.formats.deepspeed.sharding import (
    Sharding,
    from_map,
    interleaved,
    joined,
    replicated,
)

_VERSION, _MAP_VERSION = 0.4, 1
_EXACT = regex(r"\^((?:[^\\.^$*+?{}\[\]|()]|\\[^A-Za-z0-9])+)\$")
_NOT_HANDLED = {
    "parameter_to_average_patterns": "that are averaged over the ranks",
    "expert_parameter_patterns": "of experts",
    "pipeline_replicated_parameter_patterns": "that pipeline stages share",
    "parameter_with_2_sub_params_cat_dim_0": "as Megatron splits them",
}
_KEY = "universal_checkpoint_info"


class _SubParams(Struct, frozen=True):
    """`widths[sub][rank]` is what a rank holds of a sub-parameter along `dim`."""

    dim: int
    widths: tuple[tuple[int, ...], ...]


class ParallelInfo(Struct, frozen=True):
    """What is stated, by the parameter's name. `maps` are parsed once they are asked for."""

    path: Path
    maps: Mapping[str, Any]
    replicated: frozenset[str]
    rows: frozenset[str]
    vocabulary: frozenset[str]
    vocab_size: int | None
    sub_params: Mapping[str, _SubParams]
    unsupported: Mapping[str, Any]

    def sharding(self, name: str, shapes: Sequence[Shape]) -> Sharding:
        """How the ranks, whose parts have these shapes, split a parameter.

        Raises `UnsupportedError` where the checkpoint does not say, `FormatError` where what it
        says does not fit the shapes.
        """
        if name in self.unsupported:
            raise UnsupportedError(
                "tensor parallelism split it in a way that the checkpoint cannot state "
                f"({brief(self.unsupported[name])}).",
                path=self.path,
                tensor=name,
            )
        try:
            if name in self.maps:
                return from_map(self.maps[name], shapes)
            return self._by_category(name, shapes)
        except UnsupportedError as problem:
            raise UnsupportedError(problem.message, path=self.path, tensor=name) from None
        except (ValueError, KeyError, TypeError, AttributeError) as problem:
            raise FormatError(
                f"its {_KEY} describes a tensor parallel split that does not fit: {problem}.",
                path=self.path,
                tensor=name,
            ) from None

    def _by_category(self, name: str, shapes: Sequence[Shape]) -> Sharding:
        if name in self.replicated:
            return replicated(shapes)
        if name in self.sub_params:
            sub = self.sub_params[name]
            return interleaved(shapes, sub.dim, sub.widths)
        whole = joined(shapes, 1 if name in self.rows else 0)
        rows = self.vocab_size if name in self.vocabulary else None
        if rows is not None and rows < whole.shape[0]:
            # A reader should drop the rows beyond. AutoTP adds none, and states the size of the
            # first vocabulary for all: another's rows must not be dropped.
            raise ValueError(f"it has {whole.shape[0]} rows, and the vocabulary {rows}")
        return whole


def parse(info: Mapping[str, Any], path: Path) -> ParallelInfo:
    """The `universal_checkpoint_info` of the model file `path`.

    Raises `UnsupportedError` for what is not AutoTP's or of a newer version, `FormatError` where it
    is malformed.
    """
    _check_version(info, path)
    for key, what in _NOT_HANDLED.items():
        if info.get(key):
            raise UnsupportedError(
                f"its {_KEY} lists parameters {what} ({key}), which are not supported.", path=path
            )
    maps = _section(_section(info, "affine_map", path), "params", path)
    unsupported = _section(info, "autotp_unsupported_parameter_patterns", path)
    vocab_size = info.get("original_vocab_size")
    return ParallelInfo(
        path=path,
        maps={_name(pattern, path): entry for pattern, entry in maps.items()},
        replicated=_names(info, "tp_replicated_parameter_patterns", path),
        rows=_names(info, "parameter_with_row_parallelism_patterns", path),
        vocabulary=_names(info, "vocabulary_parameter_patterns", path),
        vocab_size=vocab_size if type(vocab_size) is int else None,
        sub_params=_sub_params(info, path),
        unsupported={_name(pattern, path): why for pattern, why in unsupported.items()},
    )


def _check_version(info: Mapping[str, Any], path: Path) -> None:
    version = info.get("universal_checkpoint_version", 0.0)
    map_version = _section(info, "affine_map", path).get("version", _MAP_VERSION)
    if version == _VERSION and map_version == _MAP_VERSION:
        return
    older = isinstance(version, int | float) and version < _VERSION
    why = ", which does not say of every parameter how it is split" if older else ""
    raise UnsupportedError(
        f"its {_KEY} is of version {brief(version)} with maps of version "
        f"{brief(map_version)}{why}; {_VERSION} with {_MAP_VERSION} is supported.",
        path=path,
        hint="Load and save it once with AutoTP of DeepSpeed 0.19.8." if older else None,
    )


def _sub_params(info: Mapping[str, Any], path: Path) -> dict[str, _SubParams]:
    stated = _section(info, "sub_param_shard_widths", path)
    found = {}
    for item in _list(info, "parameter_with_sub_params", path):
        try:
            (dim,) = _sizes([item["partition_dim"]])
            for pattern in item["patterns"]:
                widths = tuple(_sizes(each) for each in stated[pattern])
                found[_name(pattern, path)] = _SubParams(dim, widths)
        except (KeyError, TypeError):
            raise _malformed("parameter_with_sub_params", item, path) from None
    return found


def _sizes(values: Sequence[Any]) -> tuple[int, ...]:
    """Raises `TypeError` unless all are sizes."""
    if not all(type(value) is int and value >= 0 for value in values):
        raise TypeError
    return tuple(values)


def _name(pattern: object, path: Path) -> str:
    """The one name that a pattern matches."""
    match = _EXACT.fullmatch(pattern) if isinstance(pattern, str) else None
    if match is None:
        raise UnsupportedError(
            f"its {_KEY} selects parameters by the pattern {brief(pattern)}, which is not one "
            "parameter's name: only what AutoTP writes is supported.",
            path=path,
        )
    return re.sub(r"\\(.)", r"\1", match[1])


def _names(info: Mapping[str, Any], key: str, path: Path) -> frozenset[str]:
    return frozenset(_name(pattern, path) for pattern in _list(info, key, path))


def _list(info: Mapping[str, Any], key: str, path: Path) -> list[Any]:
    value = info.get(key) or []
    if not isinstance(value, list):
        raise _malformed(key, value, path)
    return value


def _section(info: Mapping[str, Any], key: str, path: Path) -> dict[Any, Any]:
    value = info.get(key) or {}
    if not isinstance(value, dict):
        raise _malformed(key, value, path)
    return value


def _malformed(key: str, value: object, path: Path) -> FormatError:
    return FormatError(f"its {_KEY} has a {key} of {brief(value)}.", path=path)
