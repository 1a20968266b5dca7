"""One model of each kind, made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.quantised import makers


class Model(NamedTuple):
    """A quantised model's folder, and the model as transformers loads it from there."""

    folder: Path
    model: Any


MAKERS: dict[str, Callable[[Path], Path]] = {
    "blocks": lambda folder: makers.blocks(folder, makers.llama()),
    "blocks, E8M0 scales": lambda folder: makers.blocks(folder, makers.llama(), scale_fmt="ue8m0"),
    "blocks, experts": lambda folder: makers.blocks(folder, makers.qwen3_moe()),
    "blocks, compressed-tensors": lambda folder: makers.compressed(folder, makers.llama(), "block"),
    "tensor": lambda folder: makers.compressed(folder, makers.llama(), "tensor"),
    "row": lambda folder: makers.compressed(folder, makers.llama(), "channel"),
    "mxfp4": makers.gpt_oss,
}
Get = Callable[[str], Model]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Get:
    folder = tmp_path_factory.mktemp("quantised")
    made: dict[str, Model] = {}

    def get(kind: str) -> Model:
        if kind not in made:
            place = MAKERS[kind](folder / str(len(made)))
            made[kind] = Model(place, makers.loaded(place))
        return made[kind]

    return get
