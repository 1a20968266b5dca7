"""Which part of a nested state dict is the model.

DCP flattens what was saved, `{"model": {"a.b": t}, "optimizer": ..}`, and keeps each tensor's
path, `("model", "a.b")`. Names contain dots themselves, so paths are never guessed from keys.

    saved as                                       the model's part     written by
    {"a.b": t}                                     ()                   LightRFT, hf2fsdp
    {"model": {..}, "optimizer": ..}               ("model",)           accelerate, the HF Trainer
    {"a.b": t, "optimizer": .., "train_state": ..} () without the rest  torchtitan
    {"app": {"model": {..}, "optim": ..}}          ("app", "model")     torch's tutorial
    {"state_dict": {..}, "optimizer_0": ..}        ("state_dict",)      Lightning

Everything beside it is left out: without a finding what a run needs to continue, with a finding
what could be another model (`ema`, `reference`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from shlex import quote

from msgspec import Struct

from reshard.errors import FormatError, NamesError, NotFoundError, listed, shown
from reshard.formats import MODEL, NOT_MODEL, OPTIMIZER_KEYS, RUN_STATE

Path = tuple[str, ...]

# Names listed in an error.
_LISTED = 8


class Part(Struct, frozen=True):
    """The model's part: `names` maps each key of the checkpoint in it to the tensor's name.

    `beside`: other parts that could be models, dotted, with their numbers of tensors.
    """

    path: Path
    names: Mapping[str, str]
    beside: Mapping[str, int] = {}


def find(
    tensors: Mapping[str, Path], prefix: str | None, root: str, objects: Collection[str] = ()
) -> Part:
    """The part of the checkpoint that is the model; `tensors` maps keys to paths.

    `prefix` names it (`"app.model"`); otherwise it is found by the names that frameworks use.
    `objects` are the keys of what is not a tensor, for the error.

    Raises `NotFoundError` where nothing is left, `NamesError` where it could be several,
    `FormatError` where a tensor and a dict of tensors are at one place.
    """
    if not tensors:
        there = f"; its objects are {listed(sorted(objects), _LISTED)}" if objects else ""
        raise NotFoundError(
            f"it holds no tensor{there}.", path=root, hint="There is nothing to convert."
        )
    if prefix:
        return _named(tensors, prefix, root)
    start: Path = ()
    inside = list(tensors.items())
    while (step := _step(start, [path for _, path in inside], root)) is not None:
        depth, start = len(start), (*start, step)
        inside = [(key, path) for key, path in inside if path[depth] == step]
        for _, path in inside:
            if path == start:
                raise FormatError(
                    "it is both a tensor and a dict of tensors.", path=root, tensor=".".join(path)
                )
    names = {
        key: ".".join(path[len(start) :])
        for key, path in inside
        # Beside the model's own names, at the top, lie the other parts. Deeper, all is the model.
        if start or len(path) == 1 or not NOT_MODEL.fullmatch(path[0])
    }
    return Part(start, names, _beside(tensors, names, start))


def _beside(tensors: Mapping[str, Path], names: Collection[str], start: Path) -> dict[str, int]:
    """The omitted parts that are not a run's state: beside the model's, or above it."""
    found: dict[str, int] = {}
    for key, path in tensors.items():
        depth = next((d for d, step in enumerate(start) if path[d : d + 1] != (step,)), len(start))
        beside = path[: depth + 1]
        if key not in names and len(path) > depth + 1 and not RUN_STATE.fullmatch(beside[-1]):
            dotted = ".".join(beside)
            found[dotted] = found.get(dotted, 0) + 1
    return found


def _step(start: Path, inside: Collection[Path], root: str) -> str | None:
    """The child of `start` to look into, or None where the tensors at `start` are the model.

    `inside` are the tensors' whole paths: a path of 128 steps is not copied at each of them.
    """
    depth = len(start)
    tops = {path[depth] for path in inside}
    children = {path[depth] for path in inside if len(path) > depth + 1}
    known = sorted(children.intersection(MODEL))
    if len(known) == 1:
        return known[0]
    if tops <= OPTIMIZER_KEYS:
        raise _only_optimizer(root)
    if not known and any(len(path) == depth + 1 for path in inside):
        return None
    candidates = known or sorted(c for c in children if not NOT_MODEL.fullmatch(c))
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        others = sorted(c for c in children if not RUN_STATE.fullmatch(c))
        if others:
            first = quote(shown(".".join((*start, others[0]))))
            raise NotFoundError(
                "reshard does not take these parts for the model unless you name one: "
                f"{listed(others, _LISTED)}.",
                path=root,
                hint=f"Name the part to read: --prefix {first}.",
            )
        raise _only_optimizer(root)
    several = (
        f"{'.'.join((*start, name))!r} ({sum(path[depth] == name for path in inside)} tensors)"
        for name in candidates
    )
    raise NamesError(
        f"several parts of it could be the model: {listed(several, _LISTED)}.",
        path=root,
        hint="Name the one to read with --prefix.",
    )


def _named(tensors: Mapping[str, Path], prefix: str, root: str) -> Part:
    """The part whose path, joined by dots, is `prefix`; of a flat dict, the names below it."""
    for path in tensors.values():
        depth = _depth(path, prefix)
        if depth is not None:
            start = path[:depth]
            names = {
                key: ".".join(other[depth:])
                for key, other in tensors.items()
                if len(other) > depth and other[:depth] == start
            }
            return Part(start, names)
    dotted = prefix.removesuffix(".") + "."
    flat = {key: ".".join(path) for key, path in tensors.items()}
    names = {
        key: name.removeprefix(dotted) for key, name in flat.items() if name.startswith(dotted)
    }
    if not names:
        tops = sorted({path[0].split(".")[0] for path in tensors.values()})
        raise NotFoundError(
            f"no tensor lies under the prefix {prefix!r}; the names begin with "
            f"{listed(tops, _LISTED)}.",
            path=root,
            hint="Correct --prefix, or leave it out.",
        )
    return Part((prefix,), names)


def _depth(path: Path, prefix: str) -> int | None:
    """How many of a path's first steps, joined by dots, are `prefix`; None: it is not under it."""
    rest = prefix
    for depth, step in enumerate(path[:-1], start=1):
        if rest == step:
            return depth
        if not rest.startswith(f"{step}."):
            return None
        rest = rest[len(step) + 1 :]
    return None


def _only_optimizer(root: str) -> NotFoundError:
    return NotFoundError(
        "it holds the state of an optimizer, but no model.",
        path=root,
        hint="The model's checkpoint lies beside it or in the folder above.",
    )
