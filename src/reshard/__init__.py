"""Convert checkpoints of training frameworks into one another, streamed, and prove the result.

>>> import reshard
>>> checkpoint = reshard.open("run/_actor/global_step2")              # doctest: +SKIP
>>> checkpoint.tensors["lm_head.weight"].shape                        # doctest: +SKIP
(32000, 4096)
>>> reshard.convert("run/_actor/global_step2", "out", base="Qwen2.5-7B").verified  # doctest: +SKIP
True
"""

from importlib import import_module
from typing import TYPE_CHECKING

from reshard._version import __version__
from reshard.errors import (
    FormatError,
    IncompleteError,
    NamesError,
    NotFoundError,
    OptionError,
    PlanError,
    ReshardError,
    UnsupportedError,
    VerificationError,
    WriteError,
)

if TYPE_CHECKING:
    from reshard.ailments.diagnosis import Diagnosis, doctor
    from reshard.checkpoint import Checkpoint
    from reshard.checkpoint import open_checkpoint as open
    from reshard.comparison import Comparison, diff, verify
    from reshard.conversion import convert
    from reshard.inspection import Inspection, inspect
    from reshard.report import Report
    from reshard.verification import Verified

__all__ = [
    "Checkpoint",
    "Comparison",
    "Diagnosis",
    "FormatError",
    "IncompleteError",
    "Inspection",
    "NamesError",
    "NotFoundError",
    "OptionError",
    "PlanError",
    "Report",
    "ReshardError",
    "UnsupportedError",
    "VerificationError",
    "Verified",
    "WriteError",
    "__version__",
    "convert",
    "diff",
    "doctor",
    "inspect",
    "open",
    "verify",
]

# numpy and ml_dtypes take 0.15 s to import: only what is used is loaded.
_LAZY = {
    "Checkpoint": ("reshard.checkpoint", "Checkpoint"),
    "open": ("reshard.checkpoint", "open_checkpoint"),
    "Report": ("reshard.report", "Report"),
    "convert": ("reshard.conversion", "convert"),
    "Diagnosis": ("reshard.ailments.diagnosis", "Diagnosis"),
    "doctor": ("reshard.ailments.diagnosis", "doctor"),
    "Inspection": ("reshard.inspection", "Inspection"),
    "inspect": ("reshard.inspection", "inspect"),
    "Verified": ("reshard.verification", "Verified"),
    "verify": ("reshard.comparison", "verify"),
    "diff": ("reshard.comparison", "diff"),
    "Comparison": ("reshard.comparison", "Comparison"),
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _LAZY[name]
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value
