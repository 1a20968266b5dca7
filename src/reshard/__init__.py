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
    from reshard.checkpoint import Checkpoint
    from reshard.checkpoint import open_checkpoint as open
    from reshard.comparison.compare import Comparison, diff, verify
    from reshard.conversion.convert import convert
    from reshard.conversion.report import Report
    from reshard.conversion.verification import Verified
    from reshard.core.findings import Finding
    from reshard.core.notebook import NotebookBar
    from reshard.diagnosis.diagnosis import Diagnosis, doctor
    from reshard.inspection import Inspection, inspect
    from reshard.watching.watch import watch

__all__ = [
    "Checkpoint",
    "Comparison",
    "Diagnosis",
    "Finding",
    "FormatError",
    "IncompleteError",
    "Inspection",
    "NamesError",
    "NotFoundError",
    "NotebookBar",
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
    "watch",
]

# numpy and ml_dtypes take 0.15 s to import: only what is used is loaded.
_LAZY = {
    "Checkpoint": ("reshard.checkpoint", "Checkpoint"),
    "open": ("reshard.checkpoint", "open_checkpoint"),
    "Report": ("reshard.conversion.report", "Report"),
    "convert": ("reshard.conversion.convert", "convert"),
    "Finding": ("reshard.core.findings", "Finding"),
    "NotebookBar": ("reshard.core.notebook", "NotebookBar"),
    "Diagnosis": ("reshard.diagnosis.diagnosis", "Diagnosis"),
    "doctor": ("reshard.diagnosis.diagnosis", "doctor"),
    "Inspection": ("reshard.inspection", "Inspection"),
    "inspect": ("reshard.inspection", "inspect"),
    "Verified": ("reshard.conversion.verification", "Verified"),
    "verify": ("reshard.comparison.compare", "verify"),
    "diff": ("reshard.comparison.compare", "diff"),
    "Comparison": ("reshard.comparison.compare", "Comparison"),
    "watch": ("reshard.watching.watch", "watch"),
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _LAZY[name]
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
