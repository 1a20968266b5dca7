"""Folders that a training leaves and that no user can load as they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

import reshard
from tests.doctor.conftest import Pairs, names, repaired
from tests.models import released


def test_a_class_as_fsdp_calls_it(pairs: Pairs, tmp_path: Path) -> None:
    """accelerate's FSDP2 renames the class; a save meanwhile writes that name."""
    folder = pairs("llama").copy(tmp_path / "ill")
    config = json.loads((folder / "config.json").read_text())
    text = json.dumps({**config, "architectures": ["FSDPLlamaForCausalLM"]})
    (folder / "config.json").write_text(text)
    repaired(folder, None, tmp_path / "out", "fsdp-class")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config
    released.load(tmp_path / "out", "LlamaForCausalLM")


def test_a_distributed_checkpoint_of_transformers(tmp_path: Path) -> None:
    """The files that `save_pretrained(distributed_checkpoint=True)` writes, by torch's writer."""
    tensors = released.values("llama", 1)
    base = released.write(tmp_path / "base", "llama", released.values("llama", 0))
    folder = tmp_path / "run"
    writer = HuggingFaceStorageWriter(
        str(folder), save_distributed=True, enable_consolidation=False
    )
    dcp.save(tensors, storage_writer=writer, no_dist=True)
    shutil.copy(base / "config.json", folder)
    assert names(reshard.doctor(folder, base=base))[0] == "model-files-unchecked"
    reshard.convert(folder, tmp_path / "out", base=base)
    assert not reshard.doctor(tmp_path / "out", base=base).errors
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all((written[name] == value).all() for name, value in tensors.items())
