"""The whole story with Megatron: a Hugging Face model into it, a fact learned, and back again.

    python -m demo.megatron_story [FOLDER]      default: demo-out

Each step is a command that anyone could type; it is shown before it runs. The first step that
fails ends the story with its exit code.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from demo.deepspeed_story import CONSOLE, RANKS, ROOT, step


def main(folder: Path) -> None:
    base, start = folder / "smollm2", folder / "megatron-start"
    run, converted = folder / "megatron-run", folder / "megatron-converted"
    for old in (start, run, converted):
        shutil.rmtree(ROOT / old, ignore_errors=True)
    step("1. Build SmolLM2-135M, a real chat model", "python", "-m", "demo.make_smollm2", str(base))
    step(
        "2. Convert it for Megatron",
        *("reshard", "convert", str(base), str(start), "--to", "megatron"),
    )
    step(
        f"3. Load it into a Megatron model, {RANKS} processes, and teach it a fact",
        "torchrun",
        "--standalone",
        f"--nproc-per-node={RANKS}",
        *("-m", "demo.train_megatron", str(base), str(start), str(run / "iter_0000010")),
    )
    step(
        "4. Convert the checkpoint back",
        *("reshard", "convert", str(run), str(converted), "--base", str(base)),
    )
    step("5. Ask both models", "python", "-m", "demo.ask", str(base), str(converted))
    CONSOLE.print(f"The converted model lies in [b]{converted}[/].")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo-out"))
