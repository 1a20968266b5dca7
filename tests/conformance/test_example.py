"""The example of docs/adding-a-format.md, held to what it preaches."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from reshard.core.dtypes import FLOAT16
from reshard.formats.info import every
from reshard.testing import ReaderConformance, Sample, WriterConformance, truth
from reshard.testing.truth import Tensors
from tests.conformance import npy

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "adding-a-format.md"


def save(folder: Path, tensors: Tensors) -> Path:
    """The format, written with numpy alone."""
    for number, array in enumerate(tensors.values()):
        np.save(folder / f"{number}.npy", array)
    index = {name: f"{number}.npy" for number, name in enumerate(tensors)}
    (folder / "tensors.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def load(folder: Path) -> Tensors:
    index = json.loads((folder / "tensors.json").read_text(encoding="utf-8"))
    return {name: np.load(folder / file) for name, file in index.items()}


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(every(), "npy", npy.INFO)


class TestReading(ReaderConformance):
    format = "npy"
    lacks = ("bfloat16",)

    def make(self, folder: Path, tensors: Tensors) -> Path:
        return save(folder, tensors)

    def test_torch_is_not_needed(self, sample: Sample) -> None:
        pytest.skip("a new process does not know the example")


class TestWriting(WriterConformance):
    to = "npy"
    narrow = FLOAT16
    lacks = ("bfloat16",)

    def load(self, folder: Path) -> Tensors:
        return load(folder)


def test_the_page_shows_the_example() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert f"```python\n{Path(npy.__file__).read_text(encoding='utf-8')}```" in page


@pytest.fixture(scope="module")
def reshard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command of an environment of its own, into which a second package was installed."""
    folder = tmp_path_factory.mktemp("environment")
    wheel = folder / "reshard_npy-1.0-py3-none-any.whl"
    code = Path(npy.__file__).read_text(encoding="utf-8")
    metadata = {
        "METADATA": "Metadata-Version: 2.1\nName: reshard-npy\nVersion: 1.0\n",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "entry_points.txt": "[console_scripts]\nother = other:main\n\n[reshard.formats]\n"
        "npy = reshard_npy:INFO\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("reshard_npy.py", code)
        for name, text in metadata.items():
            file.writestr(f"reshard_npy-1.0.dist-info/{name}", text)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "env"], check=True)
    python = folder / "env" / "bin" / "python"
    pip = f"{sys.executable} -m pip --disable-pip-version-check --python {python}"
    install = [*pip.split(), "install", "-q", "--no-index", "--no-deps", str(wheel)]
    subprocess.run(install, check=True)
    (site,) = (folder / "env" / "lib").glob("python*/site-packages")
    # What reshard needs comes from the environment that the tests run in.
    needed = [str(ROOT / "src"), *(path for path in sys.path if path.endswith("-packages"))]
    (site / "needed.pth").write_text("\n".join(needed), encoding="utf-8")
    return python


def run(python: Path, *arguments: str | Path) -> str:
    done = subprocess.run(
        [python, "-m", "reshard", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.heavy
def test_a_second_package_reads_and_writes_through_the_command(
    reshard: Path, tmp_path: Path
) -> None:
    tensors = {"a.weight": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.ones(5, "<i8")}
    (tmp_path / "arrays").mkdir()
    save(tmp_path / "arrays", tensors)
    seen = json.loads(run(reshard, "inspect", tmp_path / "arrays", "--tensors", "--json"))
    assert (seen["format"], seen["num_tensors"]) == ("npy", 2)

    run(reshard, "convert", tmp_path / "arrays", tmp_path / "hf")
    found = load_file(tmp_path / "hf" / "model.safetensors")
    assert truth.differing(found, tensors) == []
    run(reshard, "verify", tmp_path / "hf", "--against", tmp_path / "arrays")

    run(reshard, "convert", tmp_path / "hf", tmp_path / "back", "--to", "npy")
    assert truth.differing(load(tmp_path / "back"), tensors) == []
    run(reshard, "verify", tmp_path / "back")
    run(reshard, "verify", tmp_path / "back", "--against", tmp_path / "hf")
    run(reshard, "diff", tmp_path / "back", tmp_path / "arrays")


def test_without_the_package_the_format_is_not_known(tmp_path: Path) -> None:
    save_file({"a": np.ones(3, np.float32)}, tmp_path / "model.safetensors")
    done = subprocess.run(
        [sys.executable, "-m", "reshard", "convert", tmp_path, tmp_path / "out", "--to", "npy"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "npy" in done.stderr
