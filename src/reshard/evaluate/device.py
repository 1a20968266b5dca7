"""Where a model runs: the devices, the versions, and the seed."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import dataclass

import torch
import transformers

from reshard._version import __version__
from reshard.errors import UnsupportedError
from reshard.evaluate.report import Environment

# Weights are not all that a GPU must hold: the cache and activations of a short run take less
# than a fifth again.
_HEADROOM = 1.2


@dataclass(frozen=True, slots=True)
class Placement:
    """Where to load a model: `device_map` as `from_pretrained` takes it (None: the CPU, which
    alone needs no accelerate).

    `inputs` is the device that the inputs go to, `note` what the user should be told.
    """

    device_map: str | dict[str, str] | None
    inputs: str
    note: str | None = None


def place(device: str, weight_nbytes: int) -> Placement:
    """Turn `--device` into a placement.

    `cuda` takes the first GPU, or all of them if the weights do not fit into one; without a GPU
    it falls back to the CPU and says so. `auto` leaves the choice to accelerate. Anything else
    is a torch device. Raises `UnsupportedError` for a device that is not there.
    """
    if device == "cuda" and not torch.cuda.is_available():
        return Placement(None, "cpu", "There is no CUDA device; going on with the CPU.")
    if device == "auto":
        return Placement("auto", "cuda:0" if torch.cuda.is_available() else "cpu")
    if device == "cuda":
        free, _ = torch.cuda.mem_get_info(0)
        if torch.cuda.device_count() == 1 or weight_nbytes * _HEADROOM <= free:
            return Placement({"": "cuda:0"}, "cuda:0")
        note = f"The weights are spread over {torch.cuda.device_count()} GPUs."
        return Placement("auto", "cuda:0", note)
    _check(device)
    return Placement(None if device == "cpu" else {"": device}, device)


def _check(device: str) -> None:
    try:
        torch.empty(0, device=torch.device(device))
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        # torch built without CUDA raises AssertionError, an unknown name RuntimeError.
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnsupportedError(
            f"device {device!r} cannot be used: {first}", hint="Try --device cpu."
        ) from error


def environment() -> Environment:
    """The versions and devices of this process."""
    try:
        accelerate: str | None = importlib.metadata.version("accelerate")
    except importlib.metadata.PackageNotFoundError:
        accelerate = None
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return Environment(
        reshard=__version__,
        python=platform.python_version(),
        torch=str(torch.__version__),
        transformers=str(transformers.__version__),
        accelerate=accelerate,
        platform=f"{platform.system()} {platform.machine()}",
        cpu_threads=torch.get_num_threads(),
        gpus=tuple(torch.cuda.get_device_name(i) for i in range(count)),
    )


def set_seed(seed: int) -> None:
    """Seed torch's generators, on every device."""
    torch.manual_seed(seed)
