"""The first object of an output in a store: who writes it, and what of it a killed run may leave.

    OUT/reshard.partial.json    {"reshard", "plan", "run", "owner", "began", "files", "old",
                                 "stopped"}

It is written where there is none, or in the place of one whose run is gone, so of two runs one is
refused. A run that lives writes it again once a minute: where neither this machine nor the object
says what became of the run, its age does.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable

import msgspec
from msgspec import Struct

from reshard._version import __version__
from reshard.core.locations import CLAIM, MANIFEST, MARKS, RemotePath, leads_down
from reshard.core.sizes import span
from reshard.errors import FormatError, NotFoundError, WriteError, listed, printable
from reshard.storage import remote, strict_json
from reshard.storage.stores import Object
from reshard.transfer.lock import Owner, this_process

# Seconds between two signs of a run that lives.
BEAT = 60.0
#: Seconds without a sign after which a run of another machine is taken for dead. A clock may be
#: wrong by 15 minutes: S3 refuses requests of any that is further off.
SILENT = 20 * 60.0


class Claim(Struct, frozen=True):
    """What the first object says.

    `files` are those of the output; `old` others that are to be deleted, of an output that is
    replaced or of a run before. `stopped`: the run ended, and what is finished was kept.
    """

    reshard: str
    plan: str
    run: str
    owner: Owner
    began: str
    files: tuple[str, ...] = ()
    old: tuple[str, ...] = ()
    stopped: bool = False

    @classmethod
    def made(cls, plan: str, files: Iterable[str], old: Iterable[str] = ()) -> Claim:
        """The claim of a new run of this process."""
        began = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        return cls(__version__, plan, secrets.token_hex(16), this_process(), began,
                   tuple(files), tuple(old))  # fmt: skip

    @property
    def names(self) -> set[str]:
        """The files that its run may have written or left, as names below the output."""
        return set(filter(leads_down, (*self.files, *self.old)))

    def encoded(self) -> bytes:
        return msgspec.json.format(msgspec.json.encode(self), indent=1)


class Remains(Struct, frozen=True):
    """What a run left, or is writing: its first object, and what lies below the output.

    `seen` is the time of its last sign.
    """

    target: RemotePath
    claim: Claim
    object: Object
    there: dict[str, Object]

    @property
    def seen(self) -> float:
        marks = [o.modified for name, o in self.there.items() if name.startswith(MARKS)]
        return max([self.object.modified, *marks])

    @property
    def files(self) -> dict[str, Object]:
        """The objects of the output; `reshard.json` and what the run keeps for itself are none."""
        return {
            name: there
            for name, there in self.there.items()
            if name != MANIFEST and not name.startswith(MARKS)
        }

    def check_only_ours(self) -> None:
        """Raise `WriteError` where objects lie there that its run did not write."""
        foreign = sorted({*self.files} - self.claim.names)
        if foreign:
            raise WriteError(
                f"what a run of reshard left lies there, and {listed(foreign, 4)}, which it did "
                "not write.",
                path=self.target,
                hint="Name another output, or move away what is yours.",
            )

    @property
    def described(self) -> str:
        """How many objects, how large, how old."""
        files = self.files.values()
        nbytes = sum(file.nbytes for file in files)
        return f"{len(files)} files of {nbytes:,} bytes, {self.age} old"

    @property
    def age(self) -> str:
        """How long ago its run gave the last sign, in words."""
        return span(time.time() - self.seen)

    def check_gone(self, *, force: bool = False) -> None:
        """Raise `WriteError` unless its run is gone.

        `force`: the user says so, where this machine cannot know.
        """
        owner = self.claim.owner
        if self.claim.stopped or owner.dead:
            return
        who = f"process {owner.pid} on {printable(owner.host)}"
        if owner.here:
            raise WriteError(
                f"{who} is writing this output.",
                path=self.target,
                hint="Wait for it to end, or name another output.",
            )
        quiet = time.time() - self.seen
        if not force and quiet < SILENT:
            raise WriteError(
                f"{who} writes this output, or was killed while it did: it was last heard of "
                f"{span(quiet)} ago.",
                path=self.target,
                hint="Wait for it. If it runs no more, pass --overwrite, or convert again "
                f"{SILENT / 60:.0f} minutes after its end.",
            )


def left_at(target: RemotePath) -> Remains | None:
    """What a run left at an output, or is writing there; None where no first object is.

    Raises `WriteError` for one that is not reshard's.
    """
    if CLAIM not in remote.contents(target):
        return None
    place = target / CLAIM
    try:
        text, there = remote.read_whole(place)
    except NotFoundError:
        return None
    try:
        claim = strict_json.parse_as(text, Claim, str(place))
    except FormatError as error:
        raise WriteError(
            f"it is not what reshard leaves where it writes: {error.message}",
            path=place,
            hint="Delete it, if nobody needs it, or name another output.",
        ) from None
    return Remains(target, claim, there, dict(remote.below(target)))
