"""Released files -> a loaded model of the installed transformers -> our map -> the same files.

transformers itself is the oracle of what went where: it loads the released layout into a loaded
module, and what the fit builds from that module's tensors must be the released tensors, bit for
bit. So the result loads with no key missing and gives the logits of the module.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import save_file

from reshard.core.tensors import Entry
from tests.naming import tables
from tests.naming.tables import fit

CLASSES = {"qwen2_5_vl_backbone": "AutoModel", "llava_backbone": "AutoModel"}


def loaded(
    folder: Path, name: str, arrays: Mapping[str, tables.Array]
) -> tuple[Any, dict[str, tables.Array]]:
    """The model that transformers loads from released files, and its state dict."""
    save_file(dict(arrays), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(tables.table("4.57", name).config))
    raw = json.loads((tables.LAYOUTS / "4.57" / f"{name}.json").read_text())
    class_ = getattr(transformers, CLASSES.get(name, raw["class"]))
    model, info = class_.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model, {key: value.numpy() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("name", tables.names("4.57"))
def test_a_loaded_model_becomes_the_released_files(name: str, tmp_path: Path) -> None:
    hub = tables.table("4.57", name)
    arrays = tables.random_arrays(hub.disk_shapes())
    _, state = loaded(tmp_path, name, arrays)
    content = tables.files(state, "module.")
    source = tables.entries({key: value.shape for key, value in state.items()}, "module.")

    def equal(one: Entry, other: Entry) -> bool:
        return np.array_equal(tables.values(one, content), tables.values(other, content))

    found = fit(source, hub.schema(), equal=equal)
    assert found.entries.keys() == arrays.keys()
    for key, array in arrays.items():
        np.testing.assert_array_equal(tables.values(found.entries[key], content), array)
    assert found.config_patches == {}
    assert ("lm_head.weight" in state) == any(
        "lm_head" in key for key in (*arrays, *found.matching.tied)
    )
