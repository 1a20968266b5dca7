"""The benchmark's quantised models: fp8 in blocks of 128 x 128, as DeepSeek and Qwen release them.

Made of the Hugging Face folders' models by transformers' own quantiser: every projection is codes,
embedding, head and norms stay bfloat16.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import dcp_inputs
from benchmarks.inputs import Recipe

_BLOCK = [128, 128]


def quantised(pretrained: Callable[[Path], None]) -> Callable[[Path], None]:
    """What makes the model that `pretrained` makes, in fp8. Needs as much memory as the codes."""

    def make(folder: Path) -> None:
        pretrained(folder)
        subprocess.run([sys.executable, "-m", __name__, str(folder / "source")], check=True)

    return make


def quantise(folder: Path) -> None:
    """Quantise the model in `folder`, in its place."""
    from safetensors import safe_open
    from safetensors.torch import save_file
    from transformers.integrations.finegrained_fp8 import Fp8Quantize
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
    from transformers.utils.quantization_config import FineGrainedFP8Config

    settings = FineGrainedFP8Config(weight_block_size=_BLOCK)
    quantiser = Fp8Quantize(FineGrainedFP8HfQuantizer(settings))
    weights = folder / "model.safetensors"
    state: dict[str, Any] = {}
    with safe_open(weights, "pt") as file:
        for name in file.keys():  # noqa: SIM118 (it is no dict)
            value = file.get_tensor(name)
            codes = name.endswith("proj.weight")
            state.update(quantiser.convert({name: value}) if codes else {name: value})
    weights.unlink()
    save_file(state, weights, {"format": "pt"})
    path = folder / "config.json"
    stated = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "weight_block_size": _BLOCK,
        "activation_scheme": "dynamic",
        "modules_to_not_convert": ["lm_head"],
    }
    config = {**json.loads(path.read_text(encoding="utf-8")), "quantization_config": stated}
    path.write_text(json.dumps(config), encoding="utf-8")


RECIPES: tuple[Recipe, ...] = (
    Recipe("fp8-0.5b", "quantised", quantised(dcp_inputs.pretrained)),
    Recipe("fp8-1.9b", "quantised", quantised(dcp_inputs.pretrained_large), large=True),
)

if __name__ == "__main__":
    quantise(Path(sys.argv[1]))
