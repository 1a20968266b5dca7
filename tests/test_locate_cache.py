"""A model of the Hugging Face cache, by its name or its folder there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import reshard
from tests.oracle.cache import Oracle


@pytest.fixture
def repository(oracle: Oracle, tmp_path: Path) -> Path:
    """A repository in the Hugging Face cache, as huggingface_hub lays it out."""
    folder = tmp_path / "hub" / "models--some--model"
    (folder / "blobs").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0a1b", encoding="utf-8")
    (folder / "snapshots" / "0a1b").mkdir(parents=True)
    for file in oracle["llama-zero2"].base.iterdir():
        shutil.copy(file, folder / "blobs" / f"of-{file.name}")
        link = folder / "snapshots" / "0a1b" / file.name
        link.symlink_to(f"../../blobs/of-{file.name}")
    return folder


def test_a_repository_of_the_cache_leads_to_its_snapshot(
    oracle: Oracle, repository: Path, tmp_path: Path
) -> None:
    root = reshard.open(repository).catalog.origin.root
    assert root == repository / "snapshots" / "0a1b"
    reshard.convert(oracle["llama-zero2"].root, tmp_path / "out", base=repository)
    assert (tmp_path / "out" / "config.json").is_file()
    assert not reshard.doctor(tmp_path / "out", base=repository).errors
    reshard.convert(repository, tmp_path / "dcp", to="dcp")
    (repository / "refs" / "main").unlink()
    assert reshard.open(repository).catalog.origin.root == root
    (repository / "snapshots" / "2c3d").mkdir()
    with pytest.raises(reshard.NotFoundError, match="its snapshots are: 0a1b, 2c3d"):
        reshard.open(repository)


def test_a_model_that_is_called_by_its_name_is_found_in_the_cache(
    oracle: Oracle, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(repository.parent))
    root, out = oracle["llama-zero2"].root, tmp_path / "out"
    report = reshard.convert(root, out, base="some/model")
    snapshot = repository / "snapshots" / "0a1b"
    message = f"some/model is read from the Hugging Face cache: {snapshot}."
    assert [f.message for f in report.findings if f.code == "from-cache"] == [message]
    assert reshard.open("some/model").catalog.origin.root == snapshot
    assert reshard.inspect(root, base="some/model").fitting is not None
    with pytest.raises(reshard.NotFoundError, match="If it is on the hub: hf download another/mo"):
        reshard.convert(root, out, base="another/model", overwrite=True)
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    with pytest.raises(reshard.NotFoundError, match="must be a local folder with the original"):
        reshard.convert(root, out, base="runs/typo", overwrite=True)
    with pytest.raises(reshard.NotFoundError, match=f"Pass its folder: {snapshot}"):
        reshard.convert(root, out, base=snapshot / "config.json", overwrite=True)
