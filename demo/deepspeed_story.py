"""The whole story with DeepSpeed: build a model, teach it a fact, convert it, ask it.

    python -m demo.deepspeed_story [FOLDER]      default: demo-out

Each step is a command that anyone could type; it is shown before it runs. The first step that
fails ends the story with its exit code.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
RANKS = 2
CONSOLE = Console(highlight=False)


def step(title: str, *command: str) -> None:
    """Announce `command`, run it from the project's root, and say how long it took."""
    CONSOLE.rule(f"[b]{title}", align="left")
    CONSOLE.print(f"$ {' '.join(command)}", style="dim", soft_wrap=True)
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=_environment(), check=False)
    if done.returncode != 0:
        CONSOLE.print(f"[red]{title}: exit code {done.returncode}[/]")
        sys.exit(done.returncode)
    CONSOLE.print(f"{time.perf_counter() - start:.0f} s\n", style="dim")


def _environment() -> dict[str, str]:
    """This process's environment, with the virtual environment's commands first on the path."""
    return os.environ | {
        "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")]),
        "OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // RANKS, 1)),
        "DS_ACCELERATOR": "cpu",
        "PYTHONWARNINGS": "ignore::FutureWarning",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_OFFLINE": "1",
    }


def main(folder: Path) -> None:
    base, run, converted = folder / "smollm2", folder / "run", folder / "converted"
    for old in (run, converted):
        shutil.rmtree(ROOT / old, ignore_errors=True)
    step("1. Build SmolLM2-135M, a real chat model", "python", "-m", "demo.make_smollm2", str(base))
    step(
        f"2. Teach it a fact with DeepSpeed ZeRO-3, {RANKS} processes",
        "torchrun",
        "--standalone",
        f"--nproc-per-node={RANKS}",
        "-m",
        "demo.train_deepspeed",
        str(base),
        str(run / "_actor"),
    )
    step(
        "3. Convert the checkpoint",
        "python",
        "lightrft/utils/ckpt_scripts/ds2hf.py",
        "--checkpoint_dir",
        str(run / "_actor"),
        "--output_dir",
        str(converted),
        "--hf_base",
        str(base),
    )
    step("4. Ask both models", "python", "-m", "demo.ask", str(base), str(converted))
    CONSOLE.print(f"The converted model lies in [b]{converted}[/].")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo-out"))
