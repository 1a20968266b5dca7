"""Convert checkpoints of training frameworks into one another, streamed, and prove the result."""

from reshard._version import __version__
from reshard.errors import ReshardError

__all__ = ["ReshardError", "__version__"]
