"""Faults of the values: NaN, infinity, and weights that are the base's."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import reshard
from reshard.core import dtypes
from reshard.core.rearrange import transpose
from reshard.formats import Selection, huggingface
from reshard.storage.local import Sources
from reshard.transfer import finite, passes
from reshard.transfer.finite import NotFinite
from tests.doctor import models
from tests.doctor.conftest import Pairs, evidence, names, refused
from tests.folders import edit_config

FLOATING = [d for d in dtypes.ALL if finite.has_special(d)]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_weights_that_are_not_finite(pairs: Pairs, value: str, tmp_path: Path) -> None:
    pair = pairs("llama")
    ill = pair.copy(tmp_path / "ill")
    tensors = models.load(ill)
    tensors["model.norm.weight"][3:5] = float(value)
    tensors["lm_head.weight"][0, 0] = float("nan")
    models.save(ill, tensors)
    diagnosis = refused(ill, pair.base, tmp_path / "out", "weights-not-finite")
    told = evidence(diagnosis, "weights-not-finite")
    assert "2 of 21 tensors" in told
    counts = "2 NaN, 0 infinite" if value == "nan" else "0 NaN, 2 infinite"
    assert f"model.norm.weight ({counts} of 32)" in told
    assert "lm_head.weight (1 NaN, 0 infinite of 3072)" in told


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_every_bit_pattern_of_a_type_is_judged_as_numpy_judges_it(
    dtype: dtypes.DType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "_BLOCK", 1 << 10)
    generator = np.random.default_rng(0)
    if dtype.itemsize <= 2:
        bits = np.arange(256**dtype.itemsize, dtype=f"u{dtype.itemsize}")
        array = bits.view(dtype.numpy)
    else:
        # Exponents of all ones are rare among random bits: every fourth gets one.
        parts = generator.integers(0, 2**32, 4096, np.uint32)
        parts[::4] |= 0x7FF00000 if dtype.name == "float64" else 0x7F800000
        parts[::8] &= 0xFF800000
        array = parts.view(dtype.numpy)
    real = array.view(np.float32) if dtype.name == "complex64" else array
    with np.errstate(invalid="ignore"):
        wide = real.astype(np.float64)
    expected = NotFinite(int(np.isnan(wide).sum()), int(np.isinf(wide).sum()))
    path = tmp_path / "model.safetensors"
    raw = torch.from_numpy(array.view(np.uint8).copy()).view(getattr(torch, dtype.name))
    save_file({"x": raw}, path)
    with Sources() as sources:
        entries = huggingface.read(path, sources, Selection()).entries
        assert passes.not_finite(entries, sources, threads=1) == {"x": expected}
    assert expected.nan


def test_progress_reaches_the_end(pairs: Pairs) -> None:
    pair = pairs("llama")
    seen: dict[str, list[tuple[int, int]]] = {}
    reshard.doctor(
        pair.healthy,
        base=pair.base,
        progress=lambda what, done, total: seen.setdefault(what, []).append((done, total)),
    )
    nbytes = sum(tensor.nbytes for tensor in models.load(pair.healthy).values())
    assert seen.keys() == {"examining", "comparing"}
    for steps in seen.values():
        assert steps == sorted(steps)
        assert steps[-1] == (nbytes, nbytes)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "llava", "mixtral", "qwen3_vl_moe"])
def test_the_bases_own_weights(pairs: Pairs, name: str, tmp_path: Path) -> None:
    """As `load_state_dict(strict=False)` leaves them when no name fits, then saved."""
    pair = pairs(name)
    ill = tmp_path / "ill"
    models.loaded(pair.base).save_pretrained(ill)
    for file in pair.base.iterdir():
        if not (ill / file.name).exists():
            (ill / file.name).write_bytes(file.read_bytes())
    found = refused(
        ill, pair.base, tmp_path / "out", *names(reshard.doctor(ill)), "identical-to-base"
    )
    count = len(models.load(pair.base))
    assert evidence(found, "identical-to-base") == f"all {count} tensors hold the base's values"


def test_the_bases_own_weights_in_another_dtype(pairs: Pairs, tmp_path: Path) -> None:
    pair = pairs("llama")
    ill = pair.copy(tmp_path / "ill")
    models.save(ill, {name: value.float() for name, value in models.load(pair.base).items()})
    edit_config(ill, dtype="float32")
    refused(ill, pair.base, tmp_path / "out", "identical-to-base")


@pytest.mark.parametrize("everywhere", [False, True])
def test_a_base_beyond_the_folders_dtype_is_another(
    everywhere: bool, pairs: Pairs, tmp_path: Path
) -> None:
    """1e5 in bfloat16, and a folder in float16, which ends at 65504: it was trained."""
    pair = pairs("llama")
    base, folder = tmp_path / "base", pair.copy(tmp_path / "model")
    shutil.copytree(pair.base, base)
    beyond = models.load(base)
    for name in beyond if everywhere else ["model.norm.weight"]:
        beyond[name].view(-1)[-1] = 1e5
    models.save(base, beyond)
    half = {name: value.clamp(-6e4, 6e4).half() for name, value in beyond.items()}
    models.save(folder, half)
    edit_config(folder, dtype="float16")
    assert names(reshard.doctor(folder, base=base)) == []
    differing = {found.name for found in reshard.diff(folder, base).differences}
    assert differing == (set(half) if everywhere else {"model.norm.weight"})


@pytest.mark.parametrize("place", [0, -1])
def test_one_changed_element_is_training(pairs: Pairs, place: int, tmp_path: Path) -> None:
    pair = pairs("llama")
    folder = pair.copy(tmp_path / "model")
    tensors = models.load(pair.base)
    tensors["model.embed_tokens.weight"].view(-1)[place] += 1
    models.save(folder, tensors)
    assert names(reshard.doctor(folder, base=pair.base)) == []


def test_tensors_are_compared_to_their_last_element_in_any_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for block in ("_BLOCK", "_FIRST_LOOK", "_STRIDED_BLOCK"):
        monkeypatch.setattr(passes, block, 64)
    one = torch.randn(3, 7, 5)
    other = one.clone()
    other[2, 6, 4] += 1
    turned = one.transpose(1, 2).contiguous()
    tensors = {"one": one, "same": one.clone(), "other": other, "turned": turned}
    save_file(tensors, tmp_path / "model.safetensors")
    with Sources() as sources:
        found = huggingface.read(tmp_path, sources, Selection()).entries
        pairs = [
            (found["one"], found["same"]),
            (found["one"], found["other"]),
            (transpose(found["turned"], 1, 2), found["one"]),
            (transpose(found["turned"], 1, 2), found["other"]),
        ]
        assert passes.same(pairs, sources, threads=2) == [True, False, True, False]


def test_memory_does_not_grow_with_the_model(pairs: Pairs, tmp_path: Path) -> None:
    """Examining and comparing a tensor of 256 MiB takes less than half of it."""
    for place in (tmp_path / "base", tmp_path / "model"):
        pairs("llama").copy(place)
        tensors = models.load(place) | {"big": torch.zeros(64, 1 << 20)}
        models.save(place, tensors)
    code = (
        "import resource, sys, reshard\n"
        "reshard.doctor(sys.argv[1])\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "reshard.doctor(sys.argv[2], base=sys.argv[3], threads=2)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    small = pairs("llama").healthy
    command = [
        sys.executable,
        "-c",
        code,
        str(small),
        str(tmp_path / "model"),
        str(tmp_path / "base"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 128 << 10  # KiB
