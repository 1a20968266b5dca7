"""The example of docs/adding-a-format.md, held to what it preaches."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from reshard import formats
from reshard.testing import ReaderConformance, Sample, truth
from reshard.testing.truth import Tensors
from tests.conformance import npy

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-format.md"


class TestReading(ReaderConformance):
    format = "npy"

    def make(self, folder: Path, tensors: Tensors) -> Path:
        for number, array in enumerate(tensors.values()):
            np.save(folder / f"{number}.npy", array)
        index = {name: f"{number}.npy" for number, name in enumerate(tensors)}
        (folder / "tensors.json").write_text(json.dumps(index), encoding="utf-8")
        return folder

    @pytest.fixture(autouse=True)
    def registered(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(formats.FORMATS, "npy", npy.__name__)

    @pytest.fixture
    def sample(self, tmp_path: Path) -> Sample:
        # A .npy file cannot say bfloat16.
        own = {name: a for name, a in truth.ordinary().items() if a.dtype.name != "bfloat16"}
        folder = tmp_path / "checkpoint"
        folder.mkdir()
        return Sample(self.make(folder, own), own)

    def test_torch_is_not_needed(self, sample: Sample) -> None:
        pytest.skip("a new process does not know the example")


def test_the_page_shows_the_example() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert f"```python\n{Path(npy.__file__).read_text(encoding='utf-8')}```" in page
