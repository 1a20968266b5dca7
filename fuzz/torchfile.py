"""Fuzz the reader of torch.save files: `PYTHONPATH=src:. python fuzz/torchfile.py --seconds 60`.

Mutates the files of the hostile corpus, mends the checksum that would hide the pickle, and reads
the result. Any exception but a `ReshardError`, and any read that takes longer than `SLOW` seconds,
is printed with the file that caused it (kept as `fuzz-crash-….pt`), and the exit code is 1.

`one_input` takes any bytes, so a coverage-guided fuzzer can drive it as well.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
import traceback
import zlib
from contextlib import suppress
from pathlib import Path

from reshard.containers.torch import read, read_pickle
from reshard.errors import ReshardError
from reshard.storage.local import Sources
from tests.torchfile.handmade import Member, archive, pickle, tensor, torch_file
from tests.torchfile.hostile import FILES, GOOD, OLD_GOOD, PICKLES
from tests.torchfile.test_properties import ATOMS

# Seconds of processor time. The refusals of small files take milliseconds.
SLOW = 5.0
# Larger seeds are bombs, whose mutants only take time.
MAX_SEED_NBYTES = 8192


def one_input(data: bytes, path: Path) -> None:
    """Read `data` as a file, as a bare pickle and as an archive's pickle."""
    for content in (data, archive(Member("a/data.pkl", data), Member("a/data/0", bytes(16)))):
        path.write_bytes(content)
        with Sources() as sources, suppress(ReshardError):
            read(sources.open(path))
    with suppress(ReshardError):
        read_pickle(data, path="fuzz")


def mutate(rng: random.Random, seeds: list[bytes]) -> bytes:
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(5):
            case 0 if at < len(data):
                data[at] = rng.randrange(256)
            case 1:
                data[at:at] = rng.choice(ATOMS)
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


def program(rng: random.Random) -> bytes:
    """A random sequence of opcodes, most of them with fitting arguments."""
    return pickle(b"".join(rng.choices(ATOMS, k=rng.randint(1, 60))))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    corpus = [case.make() for case in FILES + PICKLES]
    seeds = [s for s in corpus if 0 < len(s) <= MAX_SEED_NBYTES]
    seeds += [GOOD, OLD_GOOD, pickle(tensor()), torch_file(b"}")]
    failures = count = 0
    end = time.monotonic() + options.seconds
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fuzz.pt"
        while time.monotonic() < end:
            data = program(rng) if rng.random() < 0.3 else mutate(rng, seeds)
            count += 1
            start = time.process_time()
            try:
                one_input(data, path)
                slow = time.process_time() - start > SLOW
            except Exception:
                traceback.print_exc()
                slow = True
            if slow:
                failures += 1
                kept = Path(f"fuzz-crash-{zlib.crc32(data):08x}.pt")
                kept.write_bytes(data)
                print(f"kept {kept}")
    print(f"{count} inputs, {failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
