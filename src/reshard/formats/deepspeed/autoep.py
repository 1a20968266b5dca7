"""Experts that AutoEP split, as a universal checkpoint stores them: one tensor for all experts.

    <module>.experts.w1, .w2, .w3    [experts, ...]; `ds_autoep_layers` states their number
    <module>.router.*                the router, also by the module's own name: <module>.gate.*

Read off DeepSpeed 0.19.8 (module_inject/auto_ep_layer.py, checkpoint/autoep_universal.py).
"""

from __future__ import annotations

from pathlib import Path

from msgspec.structs import replace

from reshard.containers.torch import TorchFile
from reshard.errors import FormatError, UnsupportedError
from reshard.formats.deepspeed.parse import ModelFile

_WEIGHTS = ("w1", "w2", "w3")
_ROUTER = "router"


def experts(model: ModelFile) -> dict[str, int]:
    """The stacked parameters, each with the number of experts in it.

    Raises `UnsupportedError` where one was not trained: the model file then states no shape of it.
    """
    counts = {
        f"{_under(module)}experts.{weight}": count
        for module, count in model.autoep.items()
        for weight in _WEIGHTS
    }
    frozen = counts.keys() - {name for group in model.groups for name in group}
    if frozen:
        raise UnsupportedError(
            "frozen experts that AutoEP split are not supported.",
            path=model.path,
            tensor=min(frozen),
        )
    return counts


def with_routers(model: ModelFile) -> ModelFile:
    """The model file with the routers' second names, which DeepSpeed does not state as shared."""
    shared = dict(model.shared or {})
    for module in model.autoep:
        for name, tensor in model.module.items():
            if not name.startswith(_under(module)):
                continue
            part, _, rest = name.removeprefix(_under(module)).partition(".")
            router = f"{_under(module)}{_ROUTER}.{rest}"
            copy = model.module.get(router)
            if part != _ROUTER and rest and copy is not None and copy.shape == tensor.shape:
                shared[name] = router
    return replace(model, shared=shared) if shared else model


def check(file: TorchFile, count: int, path: Path, name: str) -> None:
    """Raise `FormatError` unless a file says that it holds that many experts."""
    stated = file.value if isinstance(file.value, dict) else {}
    found = stated.get("ep_num_experts") if stated.get("is_expert_param") is True else None
    if found != count:
        raise FormatError(
            f"it states {found or 'no'} experts, but the model file states {count}: files of "
            "different saves are mixed.",
            path=path,
            tensor=name,
            hint="Make the universal checkpoint again.",
        )


def _under(module: str) -> str:
    return f"{module}." if module else ""
