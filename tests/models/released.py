"""Models of every family: released files, the state dicts of training runs, and what they compute.

Released files have the layout that transformers 4.57 writes (`tests/naming/layouts`), with random
values. A training run's state dict has the names of the transformers version that trained it:

    4.51, 4.57   from the key tables: which tensor in memory has the bytes of which one on disk
    5.23         from a loaded model of the installed transformers
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from tests.naming import tables
from tests.naming.make_layouts import FAMILIES, QWEN2_VISION

INSTALLED = "5.23"
State = dict[str, torch.Tensor]

#: Every family of the tables whose class computes logits.
MODELS = (
    "llama", "llama_tied", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text",
    "qwen2_vl", "qwen2_5_vl", "qwen2_5_vl_tied", "qwen3_vl", "llava", "llava_next", "gemma3",
    "internvl", "qwen2_audio", "mixtral", "qwen2_moe", "qwen3_moe", "qwen3_vl_moe", "gpt_oss",
    "phimoe", "ernie4_5_moe", "mistral3", "llava_next_mixtral", "internvl_moe",
)  # fmt: skip
# Qwen's vision towers need heads of a multiple of four wide; no shape depends on their number.
_HEADS = {"num_heads": int(QWEN2_VISION["embed_dim"]) // 4}


def config(name: str) -> dict[str, Any]:
    """The `config.json` of the released model."""
    found = json.loads(json.dumps(tables.table("4.57", name).config))
    if "num_heads" in found.get("vision_config", {}):
        found["vision_config"].update(_HEADS)
    return dict(found)


def values(name: str, seed: int) -> State:
    """Random float32 values for the tensors of the released files."""
    arrays = tables.random_arrays(tables.table("4.57", name).disk_shapes(), seed)
    return {key: torch.from_numpy(array) for key, array in arrays.items()}


def write(folder: Path, name: str, tensors: Mapping[str, torch.Tensor], **changes: object) -> Path:
    """A model folder with these tensors and the released model's config with `changes`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config(name), **changes}), encoding="utf-8")
    return folder


def in_memory(version: str, name: str, tensors: Mapping[str, torch.Tensor]) -> State:
    """The state dict that a run of transformers `version` (4.x) would have with these values.

    A tensor that the files leave out is a tied head: it is the embedding itself.
    """
    table = tables.table(version, name)
    state = {str(origin): tensors[key] for key, origin in table.disk.items()}
    embedding = next(key for key in state if key.endswith("embed_tokens.weight"))
    for key in table.memory.keys() - state.keys():
        assert key.endswith("lm_head.weight"), key
        state[key] = state[embedding]
    assert {key: tuple(value.shape) for key, value in state.items()} == table.memory
    return state


def loaded(base: Path, class_name: str) -> Any:
    """A random model of the base's config, no two tensors of it alike: a run's, after training."""
    made = transformers.AutoConfig.from_pretrained(base)
    torch.manual_seed(2)
    class_ = getattr(transformers, class_name)
    make = class_.from_config if class_name.startswith("Auto") else class_._from_config
    model = make(made)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.normal_()
    return model.eval()


def load(folder: Path, class_name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The model that transformers loads from a folder; no tensor is missing, left over or wrong."""
    class_ = getattr(transformers, class_name)
    model, info = class_.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, local_files_only=True
    )
    assert not any(info.values()), info
    return model.eval()


def class_of(name: str) -> str:
    """The model class of a family, by its name in transformers."""
    return FAMILIES[name][0]


def logits(model: Any, name: str) -> torch.Tensor:
    """What the model computes of a text, with an image or a sound where the family takes one."""
    make = _INPUTS.get(name, _text)
    with torch.no_grad():
        found: torch.Tensor = model(**make()).logits
    assert bool(found.isfinite().all())
    return found


def assert_same(loaded: Any, trained: Any, name: str) -> None:
    """Every tensor of two models is the same, bit for bit, and so are the logits but for the order
    of sums: matrices read from a file lie otherwise aligned, and BLAS then adds in another order.
    """
    state, other = loaded.state_dict(), trained.state_dict()
    assert state.keys() == other.keys()
    for key, value in state.items():
        assert torch.equal(value, other[key]), key
    torch.testing.assert_close(logits(loaded, name), logits(trained, name), rtol=1e-4, atol=1e-4)


def _text() -> State:
    return {"input_ids": torch.arange(3, 23).reshape(2, 10)}


def _around(token: int, count: int) -> torch.Tensor:
    """A text with `count` places for the states of a picture or a sound."""
    return torch.tensor([[5, 6, *[token] * count, 7, 8]])


def _picture(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def _patches() -> State:
    """Two by two patches of 8 x 8 points, merged into one state: Qwen's towers."""
    ids = torch.tensor([[5, 6, 92, 90, 93, 7, 8]])
    return {
        "input_ids": ids,
        "mm_token_type_ids": (ids == 90).int(),
        "pixel_values": _picture(4, 3 * 2 * 8 * 8),
        "image_grid_thw": torch.tensor([[1, 2, 2]]),
    }


def _square() -> State:
    return {"input_ids": _around(90, 4), "pixel_values": _picture(1, 3, 16, 16)}


def _next() -> State:
    """A picture of two tiles and its miniature: 4 states each, and 2 ends of lines."""
    return {
        "input_ids": _around(90, 14),
        "pixel_values": _picture(1, 3, 3, 16, 16),
        "image_sizes": torch.tensor([[16, 32]]),
    }


def _bidirectional() -> State:
    ids = _around(90, 4)
    return {**_square(), "token_type_ids": (ids == 90).int()}


def _internvl() -> State:
    return {"input_ids": _around(90, 1), "pixel_values": _picture(1, 3, 16, 16)}


def _sound() -> State:
    return {
        "input_ids": _around(90, 8),
        "attention_mask": torch.ones(1, 12, dtype=torch.int64),
        "input_features": _picture(1, 8, 32),
        "feature_attention_mask": torch.ones(1, 32, dtype=torch.int64),
    }


_INPUTS: Mapping[str, Callable[[], State]] = {
    "qwen2_vl": _patches,
    "qwen2_5_vl": _patches,
    "qwen2_5_vl_tied": _patches,
    "qwen3_vl": _patches,
    "qwen3_vl_moe": _patches,
    "llava": _square,
    "llava_next": _next,
    "llava_next_mixtral": _next,
    "gemma3": _bidirectional,
    "internvl": _internvl,
    "internvl_moe": _internvl,
    "qwen2_audio": _sound,
}
