"""A run that changes its framework twice, and whose loss does not notice.

    python -m demo.move_story [FOLDER] [PICTURE]      default: demo-out, demo-out/move.svg

The same training three times: without a stop in DeepSpeed; moved to FSDP2 and back to DeepSpeed by
`reshard convert --optimizer`, at another number of processes each time; and moved with the weights
alone. Each step is a command that anyone could type; it is shown before it runs. The first step
that fails ends the story with its exit code, and so does a curve that differs.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from demo.curve import Line, Part, draw
from demo.deepspeed_story import CONSOLE, ROOT, step

FIRST, SECOND, LAST = 40, 52, 64
# Of the loss: sums of another number of ranks round otherwise, and training makes that grow.
TOLERANCE = 1e-4


def train(title: str, ranks: int, engine: str, first: int, last: int, *options: object) -> None:
    """A part of a run, in `ranks` processes."""
    step(
        title,
        "torchrun",
        "--standalone",
        f"--nproc-per-node={ranks}",
        "-m",
        "demo.train_move",
        engine,
        str(first),
        str(last),
        *map(str, options),
    )


def convert(title: str, source: Path, target: Path, *options: str) -> None:
    """A conversion by the command line."""
    step(title, "reshard", "convert", str(source), str(target), *options)


def main(folder: Path, picture: Path) -> None:
    place = folder / "move"
    shutil.rmtree(ROOT / place, ignore_errors=True)
    whole, moved, bare = (place / f"{name}.json" for name in ("whole", "moved", "bare"))
    back, to_fsdp = place / "back.json", place / "fsdp"
    save = ("--save", place / "zero2", "--save-at", FIRST)
    train(
        "1. Train in DeepSpeed ZeRO-2, 2 processes, to the end", 2, "zero2", 1, LAST, whole, *save
    )
    convert("2. Move its save to FSDP", place / "zero2", to_fsdp, "--to", "dcp", "--optimizer")
    kept = ("--load", to_fsdp, "--save", place / "fsdp2", "--save-at", SECOND)
    train("3. Go on in FSDP2, 3 processes", 3, "fsdp2", FIRST + 1, SECOND, moved, *kept)
    universal = place / "universal"
    convert("4. Move that to DeepSpeed", place / "fsdp2", universal, "--to", "deepspeed")
    train("5. Go on in ZeRO-3, 1 process", 1, "zero3", SECOND + 1, LAST, back, "--load", universal)
    alone = ("--load", to_fsdp, "--weights-only")
    train("6. The same with the weights alone", 3, "fsdp2", FIRST + 1, LAST, bare, *alone)
    losses = {path.stem: _losses(path) for path in (whole, moved, back, bare)}
    together = losses["moved"] | losses["back"]
    apart = max(abs(loss / losses["whole"][at] - 1) for at, loss in together.items())
    without = max(abs(loss / losses["whole"][at] - 1) for at, loss in losses["bare"].items())
    (ROOT / picture).write_text(_picture(losses["whole"], together, losses["bare"]), "utf-8")
    CONSOLE.print(
        f"After both moves the loss differs from the run without a stop by at most {apart:.1e} of "
        f"it; with the weights alone, by {without:.1e}. The curves are in [b]{picture}[/]."
    )
    if apart > TOLERANCE:
        sys.exit(1)


def _picture(whole: dict[int, float], moved: dict[int, float], bare: dict[int, float]) -> str:
    return draw(
        "One training run, moved twice in the middle",
        (
            Line("DeepSpeed ZeRO-2, without a stop", "#a5c8f0", whole, wide=True),
            Line("moved with the weights alone", "#cf222e", bare, dashed=True),
            Line("moved by reshard convert --optimizer", "#0b5cad", moved),
        ),
        (
            Part("ZeRO-2, 2 processes", 1, FIRST),
            Part("FSDP2, 3 processes", FIRST + 1, SECOND),
            Part("ZeRO-3, 1 process", SECOND + 1, LAST),
        ),
    )


def _losses(path: Path) -> dict[int, float]:
    found = json.loads((ROOT / path).read_text("utf-8"))
    return {int(at): loss for at, loss in found.items()}


if __name__ == "__main__":
    given = [Path(argument) for argument in sys.argv[1:]]
    into = given[0] if given else Path("demo-out")
    main(into, given[1] if len(given) > 1 else into / "move.svg")
