"""Tiny model folders, made once a session; a test that breaks one works on its copy."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from reshard.evaluate.loading import quiet
from tests.evaluate import tiny

MAKERS: dict[str, Callable[[Path], Path]] = {
    "causal": tiny.causal,
    "causal_tied": lambda folder: tiny.causal(folder, tie=True),
    "other": lambda folder: tiny.causal(folder, seed=1),
    "classifier": tiny.classifier,
    "labels": lambda folder: tiny.classifier(folder, labels=3),
    "qwen_vl": tiny.qwen_vl,
    "llava": tiny.llava,
    "qwen_audio": tiny.qwen_audio,
    "srm_vl": lambda folder: tiny.reward(tiny.qwen_vl(folder), heads=("preference", "alignment")),
    "srm_al": lambda folder: tiny.reward(tiny.qwen_audio(folder), pooling="last"),
}
Models = Callable[[str], Path]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """The folder of a tiny model, by a name of `MAKERS`; made when first asked for."""
    quiet()
    root = tmp_path_factory.mktemp("models")

    def get(name: str) -> Path:
        folder = root / name
        return folder if folder.exists() else MAKERS[name](folder)

    return get


@pytest.fixture
def copied(models: Models, tmp_path: Path) -> Models:
    """A copy of such a folder, to be broken."""

    def get(name: str) -> Path:
        return Path(shutil.copytree(models(name), tmp_path / "copies" / name))

    return get
