"""torch.save files and pickles, read without torch and without running anything in them.

>>> from reshard.storage.local import Sources
>>> from reshard.containers.torch import read
>>> with Sources() as sources:                                      # doctest: +SKIP
...     file = read(sources.open("mp_rank_00_model_states.pt"))
>>> file.value["module"]["lm_head.weight"].shape                    # doctest: +SKIP
(32000, 4096)
"""

from reshard.containers.torch.known import Known
from reshard.containers.torch.reader import check_size, check_start, read, read_pickle, read_tables
from reshard.containers.torch.records import (
    Global,
    Instance,
    Opaque,
    Pickled,
    Storage,
    TensorRef,
    TorchFile,
)

__all__ = [
    "Global",
    "Instance",
    "Known",
    "Opaque",
    "Pickled",
    "Storage",
    "TensorRef",
    "TorchFile",
    "check_size",
    "check_start",
    "read",
    "read_pickle",
    "read_tables",
]
