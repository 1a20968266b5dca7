"""What tests do with the checkpoints of `benchmarks.giants`, whatever their format."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from msgspec.structs import replace

import reshard
from benchmarks import giants
from reshard.conversion import declared, planning
from reshard.core.plan import Plan
from reshard.storage.local import Sources
from reshard.transfer.commit import OutputFolder
from reshard.transfer.executor import Threads


def check_one_shard(folder: Path, out: Path) -> None:
    """Convert the one file of the output that holds a filled tensor, and compare that tensor."""
    options, _ = declared.parsed({"source": folder, "target": out, "max_shard_size": "100MB"})
    with Sources() as sources:
        job = planning.prepare(options, sources, strict=False, dry_run=True)
        name = f"{giants.FILLED}up_proj.weight"
        (file,) = (f for f in job.plan.files if any(s.spec.name == name for s in f.slots))
        with OutputFolder(out, "one") as target:
            one: Plan = replace(job.plan, files=(file,), texts=(), assets=())
            Threads(2, job.catalog.records).run(one, sources, target)
            tensor = reshard.open(target.partial / file.name).tensors[name]
            expected = giants.values_of(name, tensor.shape).float().numpy()
            assert np.array_equal(tensor.numpy().astype(np.float32), expected)
