"""A model folder to convert, and what a folder holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder of two tensors, with files in sub-folders."""
    folder = tmp_path / "model"
    (folder / "chat" / "templates").mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    (folder / "chat" / "templates" / "plain.jinja").write_text("{{ x }}", encoding="utf-8")
    tensors = {"w": np.arange(3000, dtype=np.float32).reshape(30, 100), "b": np.ones(7, np.int64)}
    save_file(tensors, folder / "model.safetensors")
    return folder


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
