"""Fuzz a parser: `PYTHONPATH=src:. python -m fuzz.run safetensors --seconds 60`.

Coverage-guided by atheris where it is installed, otherwise by random mutations of the seeds. Any
exception but a `ReshardError`, and any input that takes longer than `SLOW` seconds or more than
`MUCH` bytes of memory, ends the run with exit code 1; the input is kept in `fuzz/cases/TARGET`,
which `tests/test_fuzz.py` reads again.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import resource
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from importlib.util import find_spec
from pathlib import Path

CASES = Path(__file__).parent / "cases"
# Seconds of processor time. The refusals of small files take milliseconds.
SLOW = 5.0
# Bytes of memory above those that the process holds: of 256 MiB, a command itself takes 50.
MUCH = 206 << 20


def mutate(rng: random.Random, seeds: list[bytes], atoms: tuple[bytes, ...]) -> bytes:
    """A seed with some bytes changed, inserted, deleted or taken from another."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(5):
            case 0 if at < len(data):
                data[at] = rng.randrange(256)
            case 1:
                data[at:at] = rng.choice(atoms)
            case 2:
                del data[at : at + rng.randint(1, 16)]
            case 3:
                other = rng.choice(seeds)
                start = rng.randrange(len(other) + 1)
                data[at:at] = other[start : start + rng.randint(1, 64)]
            case 4:
                # The values at which lengths and offsets turn over.
                data[at : at + 4] = rng.choice([b"\xff" * 4, b"\0" * 4, b"\xff\xff\xff\x7f"])
    return bytes(data)


def peak() -> int:
    """The most bytes that this process held at once so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def by_mutation(name: str, seconds: float, seed: int) -> int:
    """Read mutants for so many seconds; returns how many failed."""
    from fuzz.targets import TARGETS
    from tests.torchfile.handmade import pickle

    target = TARGETS[name]
    rng = random.Random(seed)
    seeds = target.seeds()
    failures = count = 0
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        while time.monotonic() < end:
            data = mutate(rng, seeds, target.atoms)
            if name in ("torch", "dcp") and rng.random() < 0.3:
                # A random sequence of opcodes, most of them with fitting arguments.
                data = pickle(b"".join(rng.choices(target.atoms, k=rng.randint(1, 60))))
            count += 1
            start, before = time.process_time(), peak()
            try:
                target.read(data, Path(folder))
                failed = time.process_time() - start > SLOW or peak() - before > MUCH
            except Exception:
                traceback.print_exc()
                failed = True
            if failed:
                failures += 1
                keep(name, data)
    print(f"{name}: {count} inputs, {failures} failures")
    return failures


def keep(name: str, data: bytes) -> None:
    """Keep an input as a case."""
    folder = CASES / name.replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / f"{zlib.crc32(data):08x}"
    kept.write_bytes(data)
    print(f"kept {kept}")


def by_coverage(name: str, seconds: float, seed: int) -> int:
    """Let atheris look for inputs that reach new code; it ends the process that it runs in."""
    with tempfile.TemporaryDirectory() as folder:
        found, work = Path(folder) / "found", Path(folder) / "work"
        for made in (found, work, Path(folder) / "corpus"):
            made.mkdir()
        command = [sys.executable, "-m", "fuzz.run", name, "--inside", folder,
                   "--seconds", str(seconds), "--seed", str(seed)]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        kept = list(found.iterdir())
        for path in kept:
            keep(name, path.read_bytes())
        failed = len(kept) or done.returncode
        if failed:
            print(done.stdout, done.stderr)
        else:
            print(f"{name}: {done.stderr.strip().splitlines()[-1]}")
        return failed


def inside(name: str, seconds: float, seed: int, folder: Path) -> None:
    """What atheris runs: a process that ends with the fuzzing."""
    import atheris

    with atheris.instrument_imports(include=["reshard"]):
        from fuzz.targets import TARGETS

    target = TARGETS[name]
    for number, content in enumerate(target.seeds()):
        (folder / "corpus" / str(number)).write_bytes(content)

    def one_input(data: bytes) -> None:
        before = peak()
        with contextlib.redirect_stdout(None):
            target.read(data, folder / "work")
        assert peak() - before <= MUCH

    options = [f"-max_total_time={max(1, round(seconds))}", f"-seed={seed + 1}", "-max_len=65536",
               f"-timeout={round(SLOW)}", f"-artifact_prefix={folder / 'found'}/",
               "-rss_limit_mb=1024", str(folder / "corpus")]  # fmt: skip
    atheris.Setup([sys.argv[0], *options], one_input)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("target")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mutate", action="store_true", help="without atheris")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside is not None:
        inside(options.target, options.seconds, options.seed, options.inside)
        return 0
    guided = find_spec("atheris") is not None and not options.mutate
    fuzz = by_coverage if guided else by_mutation
    return 1 if fuzz(options.target, options.seconds, options.seed) else 0


if __name__ == "__main__":
    sys.exit(main())
