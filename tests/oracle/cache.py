"""Making the oracle's checkpoints once, and finding them again."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from safetensors.torch import load_file

from tests.oracle.recipes import BY_NAME, RECIPES, Recipe, Save

Array = np.ndarray[Any, np.dtype[Any]]
_HERE = Path(__file__).parent
_LOG = "oracle.log"
_LOCK = "lock"


@dataclass(frozen=True)
class Saved:
    """One checkpoint and the truth of the running engine at that moment."""

    save: Save
    path: Path
    truth: Path

    @cached_property
    def facts(self) -> Mapping[str, Any]:
        """`truth.json`: buffers, frozen, tied, groups, dtypes, shapes, versions."""
        facts: dict[str, Any] = json.loads((self.truth / "truth.json").read_text("utf-8"))
        return facts

    def masters(self) -> dict[str, Array]:
        """Every trainable parameter's master weights, in full shape; tied ones once."""
        return _load(self.truth / "truth_fp32.safetensors")

    def module(self) -> dict[str, Array]:
        """What the module computes with, by every name of its state dict."""
        return _load(self.truth / "truth_module.safetensors")

    def expected(self) -> dict[str, Array]:
        """The checkpoint's best values: masters, then frozen and buffers as the module has them.

        Tied parameters once; frozen ones only where they were saved.
        """
        masters = self.masters()
        tied = self.facts["tied"]
        left_out = set(self.facts["frozen"]) if self.save.exclude_frozen else set()
        if self.facts["zero_stage"] < 3:
            left_out -= set(tied.values())  # the module still has them, under their other names
        return {
            name: masters.get(name, value)
            for name, value in self.module().items()
            if name not in tied and name not in left_out
        }


@dataclass(frozen=True)
class Case:
    """A recipe's results on disk."""

    recipe: Recipe
    folder: Path

    @property
    def root(self) -> Path:
        """The folder given to `save_checkpoint`: it holds `latest` and the tag folders."""
        return self.folder / "checkpoint"

    @cached_property
    def saves(self) -> tuple[Saved, ...]:
        """Every save of the run, in order."""
        return tuple(
            Saved(save, self.root / save.tag, self.folder / f"truth-{index}")
            for index, save in enumerate(self.recipe.saves)
        )

    @property
    def last(self) -> Saved:
        """The last save, which `latest` names unless the recipe says otherwise."""
        return self.saves[-1]

    @property
    def base(self) -> Path:
        """The model before training, as `save_pretrained` wrote it (`llama*` models only)."""
        return self.folder / "base"

    @property
    def export(self) -> Path:
        """`save_16bit_model`'s folder (`export_16bit` recipes only)."""
        return self.folder / "export"

    @property
    def universal(self) -> Path:
        """`ds_to_universal`'s output folder (`universal` recipes only)."""
        return self.folder / "universal"


class Oracle(Mapping[str, Case]):
    """Every recipe's case, by the recipe's name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __getitem__(self, name: str) -> Case:
        return Case(BY_NAME[name], self.folder / name)

    def __iter__(self) -> Iterator[str]:
        return iter(BY_NAME)

    def parallel(self, name: str) -> Path:
        """The folder of a run with more than data parallelism: its `checkpoint/`, perhaps `base/`.

        `name` is one of `recipes.PARALLEL`.
        """
        return self.folder / name

    def __len__(self) -> int:
        return len(RECIPES)


def open_or_make(parent: Path) -> Oracle:
    """The oracle under `parent`: made now, unless the same sources and versions made it before."""
    key = digest_of(_HERE.glob("*.py"), ("torch", "deepspeed", "transformers", "safetensors"))
    return Oracle(kept(parent, key, make))


def kept(parent: Path, key: str, make: Callable[[Path], None]) -> Path:
    """The folder `key` under `parent`, which `make` fills unless an earlier run made it.

    It is made in a temporary folder and renamed once complete, so that an interrupted run leaves
    nothing that looks whole. Whatever else lies in `parent` is removed first. Two test runs at once
    wait for each other.
    """
    target = parent / key
    with open(parent / _LOCK, "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_dir():
            for old in parent.iterdir():
                if old.is_dir():
                    shutil.rmtree(old)
            made = Path(tempfile.mkdtemp(prefix="partial-", dir=parent))
            make(made)
            made.rename(target)
    return target


def digest_of(sources: Iterable[Path], packages: Iterable[str]) -> str:
    """A digest of all that decides what is made: these files, and the packages' versions."""
    digest = hashlib.sha256()
    for source in sorted(sources):
        digest.update(source.read_bytes())
    for package in packages:
        digest.update(f"{package}=={metadata.version(package)}".encode())
    return digest.hexdigest()[:16]


def make(folder: Path, names: Sequence[str] = (), device: str = "cpu") -> None:
    """Make the recipes of these names, or all that need no GPU, on `device` (cpu or cuda)."""
    root = _HERE.parent.parent
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
        "DS_ACCELERATOR": device,
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",  # compiling a few tiny optimizer steps takes longer than all
    }
    if device == "cuda":
        # Else DeepSpeed compiles its operators for every architecture that torch was built for.
        capability = torch.cuda.get_device_capability()
        environment["TORCH_CUDA_ARCH_LIST"] = ".".join(map(str, capability))
    done = subprocess.run(
        [sys.executable, "-m", "tests.oracle.launch", str(folder), *names],
        cwd=root,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    (folder / _LOG).write_text(done.stdout, encoding="utf-8")
    if done.returncode != 0:
        raise RuntimeError(f"the oracle failed; the end of {folder / _LOG}:\n{done.stdout[-4000:]}")


def to_numpy(tensor: torch.Tensor) -> Array:
    """A torch tensor as a numpy array of the same bits; bfloat16 through ml_dtypes."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        bits: Array = tensor.view(torch.uint16).numpy()
        return bits.view(ml_dtypes.bfloat16)
    array: Array = tensor.numpy()
    return array


def _load(path: Path) -> dict[str, Array]:
    return {name: to_numpy(tensor) for name, tensor in load_file(path).items()}
