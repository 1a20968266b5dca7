"""Files that are missing, cut off, exchanged or of another save: the hint asks for the whole ones.

Each case spoils one file of a checkpoint that DeepSpeed, torch or reshard wrote; following the hint
is to put it back, and the conversion then gives what the checkpoint holds.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import reshard
from tests.hints.case import CASES, GOLDEN, Case, as_golden, golden

Damage = Callable[[Path], object]

OPTIM = "global_step2/bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt"
MODEL3 = "global_step2/zero_pp_rank_{}_mp_rank_00_model_states.pt"
MODEL = "global_step2/mp_rank_00_model_states.pt"
RANK = "global_step_7/actor/model_world_size_3_rank_{}.pt"
CONFIG = "global_step_7/actor/fsdp_config.json"


def cut(share: float) -> Damage:
    return lambda path: os.truncate(path, int(path.stat().st_size * share))


def flipped(at: float) -> Damage:
    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[int(len(data) * at)] ^= 1
        path.write_bytes(data)

    return flip


def zeroed(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def holding(content: bytes) -> Damage:
    return lambda path: path.write_bytes(content)


def overwritten_by(other: str) -> Damage:
    return lambda path: shutil.copy(path.parent / other, path)


def linked(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/hostname")


def _without_model_files(path: Path) -> None:
    for file in path.parent.glob("*model_states.pt"):
        file.unlink()


_LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
_TAR = bytes(257) + b"ustar\0" + bytes(300)
_EXCHANGED = "bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt".format

# hint, golden checkpoint, file, what happens to it
DAMAGES: list[tuple[str, str, str, Damage]] = [
    ("Copy every rank's files; on several nodes without shared storage, each node has its own.",
     "zero2", OPTIM.format(1), Path.unlink),
    ("Copy the files of every rank, mp_rank_*_model_states.pt included.",
     "zero2", MODEL, Path.unlink),
    ("It was never written; use another checkpoint.", "zero2", OPTIM.format(0), cut(0)),
    ("It was truncated while it was written or copied; copy it again.",
     "zero2", OPTIM.format(0), cut(0.5)),
    ("The save or the copy was interrupted; use another checkpoint.",
     "zero2", OPTIM.format(0), zeroed),
    ("Run `git lfs pull` in its repository.", "zero2", OPTIM.format(2), holding(_LFS)),
    ("Unpack it first.", "zero2", OPTIM.format(2), holding(b"\x1f\x8b" + bytes(60))),
    ("Unpack it, or load and save it again with torch.", "zero2", MODEL,
     holding(b"x" + _TAR[1:])),
    ("Download it again.", "zero3", MODEL3.format(1), holding(b"<html></html>")),
    ("The file is damaged or is not what its name says.",
     "zero3", OPTIM.format(1), holding(b'{"a": 1}')),
    ("Copy each rank's own file under its own name.",
     "zero2", OPTIM.format(0), overwritten_by(_EXCHANGED(2))),
    ("Copy all files of one save.", "zero3", MODEL3.format(1), overwritten_by(_EXCHANGED(0))),
    ("The file is damaged; copy it again or use another checkpoint.",
     "zero3", MODEL3.format(0), flipped(0.5)),
    ("The file was truncated; copy it again or use another checkpoint.",
     "legacy", OPTIM.format(0), cut(0.5)),
    ("The files come from different saves, or a rank's file is missing.",
     "legacy", OPTIM.format(0), overwritten_by(_EXCHANGED(1))),
    ("Did you mean {}?", "zero2", "latest", holding(b"global")),
    ("Name one of them with --tag.", "zero2", "latest", holding(b"<html>")),
    ("The checkpoint is damaged or was crafted to mislead.", "zero2", "latest", holding(b"\0\0")),
    ("Put the file itself in the folder.", "zero2", OPTIM.format(1), linked),
    ("Copy the whole folder again; each rank wrote files of its own.",
     "dcp", "__0_0.distcp", Path.unlink),
    ("The folder holds files from different saves; copy one save completely.",
     "dcp", "__2_0.distcp", overwritten_by("__1_0.distcp")),
    (("Use an earlier checkpoint, or copy the folder again if the file was left behind (its name "
      "begins with a dot)."), "dcp", ".metadata", Path.unlink),
    ("The save did not finish; use another one.", "dcp", ".metadata", cut(0)),
    ("The file is damaged or is not what it seems.", "dcp", ".metadata", zeroed),
    ("The file is damaged, or was not written by torch.distributed.checkpoint.",
     "dcp", ".metadata", holding(b"\x80\x02}q\x00.")),
    ("Copy the whole folder again; each rank wrote files of its own.",
     "dcp", "__0_0.distcp", holding(b"<html>")),
    ("Copy the files of all ranks, from all nodes if each kept its own.",
     "ranks/no-mesh", RANK.format(0), Path.unlink),
    ("The file was damaged after it was saved; copy it again.",
     "ranks/no-mesh", RANK.format(0), flipped(0.5)),
    ("A rank's file was copied or renamed; copy each rank's own file.",
     "ranks/no-mesh", RANK.format(0), overwritten_by("model_world_size_3_rank_2.pt")),
    ("It is damaged or was edited by hand; remove one of the two.",
     "ranks/no-mesh", CONFIG, holding(b'{"world_size": 3, "world_size": 2}')),
    ("Save it as UTF-8 without one.",
     "ranks/no-mesh", CONFIG, holding(b'\xef\xbb\xbf{"world_size": 3}')),
    ("It is not what its name says.", "ranks/no-mesh", CONFIG, holding(b" " * (17 << 20))),
    ("Copy the whole folder again, or name a rank's file of the save to read.",
     "ranks/no-mesh", CONFIG, holding(b'{"world_size": 8}')),
    ("It is damaged or was crafted to exhaust memory.",
     "ranks/no-mesh", CONFIG, holding(b"[" + b"1," * (2 << 20) + b"1]")),
]  # fmt: skip


def _restored(name: str, file: str, damage: Damage) -> Callable[[Path], Case]:
    def make(at: Path) -> Case:
        folder = golden(name, at / "run")
        damage(folder / file)

        def convert() -> object:
            return reshard.convert(folder, at / "out")

        def restored() -> object:
            (folder / file).unlink(missing_ok=True)
            shutil.copy(GOLDEN / name / "checkpoint" / file, folder / file)
            return convert()

        whole = (GOLDEN / name / "digests.json").is_file()
        return Case(convert, restored, same=as_golden(name) if whole else None)

    return make


for _hint, _name, _file, _damage in DAMAGES:
    CASES.setdefault(_hint, []).append(_restored(_name, _file, _damage))
