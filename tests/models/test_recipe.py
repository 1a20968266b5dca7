"""The recipes of docs/hf2fsdp.md, as printed: the commands, the code, and a run of LightRFT."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import reshard
from reshard.cli.lightrft import hf2fsdp
from reshard.conversion.options import To
from tests import child
from tests.models import released

MODELS = ("qwen2_5_vl", "qwen2_5_vl_tied", "llama_tied")
COMMANDS = re.findall(
    r"```bash\n(.*?)```", (child.ROOT / "docs" / "hf2fsdp.md").read_text("utf-8"), re.DOTALL
)


def typed(command: str) -> list[str]:
    """A printed command's arguments, without `python` and the script."""
    python, script, *arguments = shlex.split(command.replace("\\\n", " "))
    assert (python, Path(script).name) == ("python", "hf2fsdp.py")
    return arguments


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each model through the page's commands, then through LightRFT's calls and the page's code."""
    root = tmp_path_factory.mktemp("recipe")
    for name in MODELS:
        base = released.write(root / name / "base", name, released.values(name, seed=0))
        places = {
            "checkpoints/qwen25-vl-7b-s10-0321-150": str(base),
            "results/qwen25-vl-7b-fsdp": str(root / name / "printed/results/qwen25-vl-7b-fsdp"),
            "results/lightrft-7B-fsdp/_actor/global_step0": str(
                root / name / "run/_actor/global_step0"
            ),
        }
        assert len(COMMANDS) == 2
        for command in COMMANDS:
            arguments = [places.get(argument, argument) for argument in typed(command)]
            done = CliRunner().invoke(hf2fsdp.command, arguments)
            assert done.exit_code == 0, done.exception
    child.run("tests.models.lightrft_load", str(root), *MODELS)
    return root


@pytest.mark.parametrize("file", ["loaded", "printed"])
@pytest.mark.parametrize("name", MODELS)
def test_the_live_model_holds_what_the_files_hold(loaded: Path, name: str, file: str) -> None:
    # The oracle: what transformers itself makes of the same files.
    expected = released.load(loaded / name / "base", released.class_of(name)).state_dict()
    found = load_file(loaded / name / f"{file}.safetensors")
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize("name", MODELS)
def test_client_state_is_what_lightrft_reads(loaded: Path, name: str) -> None:
    assert json.loads((loaded / name / "client_state.json").read_text()) == {"consumed_samples": 0}
    assert reshard.verify(loaded / name / "run/_actor/global_step0").num_tensors


@pytest.mark.parametrize("number", [0, 1, 2**31, 2**62])
def test_any_number_of_samples(tmp_path: Path, number: int) -> None:
    torch.save({"model.norm.weight": torch.ones(2)}, tmp_path / "model.pt")
    out = tmp_path / "out"
    reshard.convert(tmp_path / "model.pt", out, to="dcp", consumed_samples=number)
    assert torch.load(out / "client_state.pt") == {"consumed_samples": number}


@pytest.mark.parametrize(("to", "number"), [("hf", 1), ("dcp", -1), ("dcp", 1 << 63)])
def test_a_number_of_samples_that_means_nothing(tmp_path: Path, to: To, number: int) -> None:
    torch.save({"model.norm.weight": torch.ones(2)}, tmp_path / "model.pt")
    with pytest.raises(reshard.OptionError, match=r"^consumed_samples: "):
        reshard.convert(tmp_path / "model.pt", tmp_path / "o", to=to, consumed_samples=number)
