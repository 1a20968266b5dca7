"""Compare the layers of a model whose architecture no table knows with each other.

A layer is damaged if another layer has all of its names, most layers have a name that it lacks, and
it holds the rest of the module where that name belongs. This does not mistake a model with several
kinds of layers for a damaged one: each kind has something that the others lack, or lacks a whole
module.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Set
from typing import Any

from reshard.core.regex import regex

_CONTAINER = regex(r"(?:.*?\.)?(?:layers|layer|h|block|blocks|resblocks)(?=\.\d+\.)")
# At least so many layers, of which at most a third lack a name: else the model is made like this.
_LEAST, _SHARE = 3, 3
# Keys of a config that say how many layers there are.
_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth")
# With this many layers that read the keys and values of others, those hold none of their own.
_SHARED = "num_kv_shared_layers"


def absent(names: Iterable[str], config: Mapping[str, Any]) -> tuple[str, ...]:
    """The tensors that a layer lacks and its sister layers have."""
    if config.get(_SHARED):
        return ()
    found = []
    for container, layers in sorted(_containers(names).items()):
        if len(layers) < _LEAST:
            continue
        counts = Counter(rest for held in layers.values() for rest in held)
        most = len(layers) - len(layers) // _SHARE
        common = {rest for rest, count in counts.items() if count >= most}
        larger = _Larger(layers.values(), counts)
        for number, held in sorted(layers.items()):
            lacking = common - held
            if not lacking or not larger.than(held):
                continue
            modules = {rest.rpartition(".")[0].rpartition(".")[0] for rest in held}
            lost = (r for r in lacking if r.rpartition(".")[0].rpartition(".")[0] in modules)
            found += [f"{container}.{number}.{rest}" for rest in sorted(lost)]
    return tuple(found)


class _Larger:
    """Whether some layer has all names of another, and more; 10,000 layers may be compared."""

    def __init__(self, layers: Iterable[Set[str]], counts: Mapping[str, int]) -> None:
        self._counts = counts
        self._holders: dict[str, list[Set[str]]] = {}
        for held in layers:
            for rest in held:
                self._holders.setdefault(rest, []).append(held)
        self._known: dict[frozenset[str], bool] = {}

    def than(self, held: Set[str]) -> bool:
        key = frozenset(held)
        if key not in self._known:
            rarest = min(held, key=self._counts.__getitem__)
            self._known[key] = any(held < other for other in self._holders[rarest])
        return self._known[key]


def uncounted(names: Iterable[str], config: Mapping[str, Any]) -> tuple[str, int, int, str] | None:
    """The layers of a model that are not as many as its config says: prefix, number, the number
    stated, and by which key. None where the config states none, or there are several kinds."""
    stated = [key for key in _COUNTS if isinstance(config.get(key), int)]
    containers = {
        name: layers
        for name, layers in _containers(names).items()
        if not re.search(r"\.\d+\.", name)
    }
    if len(stated) != 1 or len(containers) != 1:
        return None
    ((container, layers),) = containers.items()
    number = config[stated[0]]
    # A config may state a billion.
    if len(layers) == number and all(0 <= index < number for index in layers):
        return None
    return f"{container}.", len(layers), number, stated[0]


def _containers(names: Iterable[str]) -> dict[str, dict[int, set[str]]]:
    """Module with numbered layers -> layer -> its names; of nested modules, the outermost."""
    found: dict[str, dict[int, set[str]]] = {}
    for name in names:
        match = _CONTAINER.match(name)
        if match is None:
            continue
        number, _, rest = name[match.end() + 1 :].partition(".")
        found.setdefault(match.group(), {}).setdefault(int(number), set()).add(rest)
    return found
