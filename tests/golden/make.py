"""Makes the golden checkpoints again: `python -m tests.golden.make [NAME ...]`.

Needed only to add one: those that are here stay as they are, byte for byte.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors.torch import load_file

from tests import child
from tests.golden.table import CONVERSIONS, GOLDEN, HERE, Golden, converted
from tests.tensors import raw


def main(names: list[str]) -> None:
    for name in names or GOLDEN:
        with tempfile.TemporaryDirectory() as scratch:
            _make(name, GOLDEN[name], Path(scratch))


def _make(name: str, golden: Golden, scratch: Path) -> None:
    child.run(golden.oracle, str(scratch), golden.recipe)
    made = scratch / golden.recipe
    shutil.rmtree(HERE / name, ignore_errors=True)
    shutil.copytree(
        made / "checkpoint", HERE / name / "checkpoint", ignore=shutil.ignore_patterns("*.py")
    )
    content = {
        "written by": {package: version(package) for package in golden.writers},
        "recipe": golden.recipe,
        "tensors": {n: described(t) for n, t in sorted(_truth(made).items())},
        "files": {
            what: converted(name, options, scratch / f"out-{number}")
            for number, (what, options) in enumerate(CONVERSIONS.items())
        },
    }
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    (HERE / name / "digests.json").write_text(text, encoding="utf-8")


def _truth(made: Path) -> dict[str, torch.Tensor]:
    """What the running ranks held: masters where there are any, tied weights once."""
    if (made / "truth.safetensors").is_file():
        whole: dict[str, torch.Tensor] = load_file(made / "truth.safetensors")
        return whole
    truth = made / "truth-0"
    tied = json.loads((truth / "truth.json").read_text(encoding="utf-8"))["tied"]
    module = load_file(truth / "truth_module.safetensors")
    masters = load_file(truth / "truth_fp32.safetensors")
    return {name: value for name, value in (module | masters).items() if name not in tied}


def described(tensor: torch.Tensor) -> dict[str, Any]:
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "xxh3_128": xxhash.xxh3_128_hexdigest(raw(tensor)),
    }


if __name__ == "__main__":
    main(sys.argv[1:])
