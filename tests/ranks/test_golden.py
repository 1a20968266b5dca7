"""What verl 0.9.1 and FSDP1 wrote, in `tests/golden/ranks`, converted as transformers saves it.

Each folder holds the checkpoint, the base's config, and `expected.json`: what wrote it, the base's
names, and every tensor of the model as `save_pretrained` of the trained module gave it, LoRA merged
in float32 and rounded once.

    no-mesh        FSDP1 without a device mesh: ShardedTensor          Qwen2, 3 ranks
    tied           FSDP1, head and embedding tied and both saved       Qwen3, 3 ranks
    experts        FSDP2, experts stacked by transformers 5            Qwen3-MoE
    critic         FSDP2, ForTokenClassification: score with bias      Qwen2
    lora           FSDP2, the whole state dict of PEFT, alpha 17       Qwen2
    lora-only      FSDP2, save_lora_only: adapters alone, alpha 9      Llama
    local-slices   LOCAL_STATE_DICT, use_orig_params=True              Qwen3, 3 ranks
    local-flat     LOCAL_STATE_DICT, use_orig_params=False             Llama
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import reshard
from tests import folders
from tests.golden.make import described

GOLDEN = Path(__file__).parents[1] / "golden" / "ranks"
CASES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
# Of these, adapters alone were trained.
_ALONE = {"lora-only": {"fill_from_base": True}}


def expected(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((GOLDEN / name / "expected.json").read_text("utf-8"))
    return content


def base_of(name: str, folder: Path) -> Path:
    """The base: its own weights where the result depends on them, zeros elsewhere."""
    base = GOLDEN / name / "base"
    if (base / "model.safetensors").exists():
        return Path(shutil.copytree(base, folder))
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    return folders.zeros(folder, folders.meta(expected(name)["base"]), config)


def test_all_cases_are_there() -> None:
    assert len(CASES) == 8


@pytest.mark.heavy
@pytest.mark.parametrize("name", CASES)
def test_they_become_what_transformers_saves(name: str, tmp_path: Path) -> None:
    base, out, source = base_of(name, tmp_path / "base"), tmp_path / "out", GOLDEN / name
    options = _ALONE.get(name, {})
    checkpoint = source / "checkpoint"
    report = reshard.convert(checkpoint, out, base=base, dtype="keep", **options)  # type: ignore[arg-type]
    found = {n: described(t) for n, t in load_file(out / "model.safetensors").items()}
    assert found == expected(name)["hf"]
    assert report.verified
    assert reshard.verify(out, checkpoint, base=base).num_tensors == len(found)
    if name not in _ALONE:
        assert reshard.verify(out, checkpoint).num_tensors == len(found)
    origin = reshard.open(checkpoint).catalog.origin
    assert origin.world_size == expected(name)["world_size"]
    assert reshard.inspect(checkpoint, base=base).fitting is not None


@pytest.mark.parametrize(("name", "alpha"), [("lora", 17), ("lora-only", 9)])
def test_alpha_is_verls(name: str, alpha: int, tmp_path: Path) -> None:
    base = base_of(name, tmp_path / "base")
    options = _ALONE.get(name, {})
    run = shutil.copytree(GOLDEN / name / "checkpoint", tmp_path / "run")
    report = reshard.convert(run, tmp_path / "out", base=base, **options)  # type: ignore[arg-type]
    (note,) = [f for f in report.findings if f.code == "alpha-from-file"]
    assert f"alpha {alpha} was taken from" in note.message
    assert "lora_train_meta.json" in note.message
    assert report.merged == 21

    actor = run / "global_step_7" / "actor"
    (actor / "lora_train_meta.json").unlink()
    with pytest.raises(reshard.PlanError, match="not the alpha"):
        reshard.convert(run, tmp_path / "no", base=base, **options)  # type: ignore[arg-type]
    again = reshard.convert(
        run,
        tmp_path / "again",
        base=base,
        lora_alpha=alpha,
        **options,  # type: ignore[arg-type]
    )
    assert again.merged == 21
    written = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("out", "again")]
    assert written[0] == written[1]


def test_an_alpha_that_was_not_known_is_not_taken(tmp_path: Path) -> None:
    """verl's merger writes `lora_adapter/` with an alpha of 0 where it does not know it."""
    base = base_of("lora", tmp_path / "base")
    run = shutil.copytree(GOLDEN / "lora" / "checkpoint", tmp_path / "run")
    actor = run / "global_step_7" / "actor"
    (actor / "lora_adapter").mkdir()
    stated = actor / "lora_adapter" / "adapter_config.json"

    def state(alpha: float) -> None:
        settings = {"peft_type": "LORA", "r": 8, "lora_alpha": alpha}
        stated.write_text(json.dumps(settings), encoding="utf-8")

    state(0)  # verl's other file knows it
    assert reshard.convert(run, tmp_path / "out", base=base).merged == 21
    state(32)
    message = r"alpha 32, but .*lora_train_meta\.json states another"
    with pytest.raises(reshard.PlanError, match=message):
        reshard.convert(run, tmp_path / "no", base=base)
    (actor / "lora_train_meta.json").unlink()
    state(0)
    with pytest.raises(reshard.PlanError, match="an alpha of 0, which switches the adapters off"):
        reshard.convert(run, tmp_path / "no", base=base)
    state(17)
    assert reshard.convert(run, tmp_path / "same", base=base).merged == 21
    written = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("out", "same")]
    assert written[0] == written[1]


def test_it_converts_to_dcp_as_well(tmp_path: Path) -> None:
    checkpoint = GOLDEN / "no-mesh" / "checkpoint"
    assert reshard.convert(checkpoint, tmp_path / "dcp", to="dcp").verified
    assert reshard.diff(tmp_path / "dcp", checkpoint).same
