"""The whole story with FSDP: a Hugging Face model into FSDP2, a fact learned, and back again.

    python -m demo.fsdp_story [FOLDER]      default: demo-out

Each step is a command that anyone could type; it is shown before it runs. The first step that
fails ends the story with its exit code.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from demo.deepspeed_story import CONSOLE, RANKS, ROOT, step

_SCRIPTS = "lightrft/utils/ckpt_scripts"


def main(folder: Path) -> None:
    base, start = folder / "smollm2", folder / "fsdp-start"
    run, converted = folder / "fsdp-run", folder / "fsdp-converted"
    for old in (start, run, converted):
        shutil.rmtree(ROOT / old, ignore_errors=True)
    checkpoint = run / "_actor" / "global_step10"
    step("1. Build SmolLM2-135M, a real chat model", "python", "-m", "demo.make_smollm2", str(base))
    step(
        "2. Convert it for FSDP",
        "python",
        f"{_SCRIPTS}/hf2fsdp.py",
        "--hf_checkpoint",
        str(base),
        "--output",
        str(start),
    )
    step(
        f"3. Load it into FSDP2, {RANKS} processes, and teach it a fact",
        "torchrun",
        "--standalone",
        f"--nproc-per-node={RANKS}",
        "-m",
        "demo.train_fsdp",
        str(base),
        str(start),
        str(checkpoint),
    )
    step(
        "4. Convert the checkpoint back",
        "python",
        f"{_SCRIPTS}/fsdp2hf.py",
        "--hf_base",
        str(base),
        "--checkpoint_dir",
        str(checkpoint),
        "--output_dir",
        str(converted),
    )
    step("5. Ask both models", "python", "-m", "demo.ask", str(base), str(converted))
    CONSOLE.print(f"The converted model lies in [b]{converted}[/].")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo-out"))
