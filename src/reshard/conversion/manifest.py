"""`reshard.json`: where a folder's tensors came from, and the digest of each.

    {"reshard": its version, "version": 2, "source": {format, tag, framework, version, world_size},
     "options": {...}, "names": {prefix, rules, tied, filled, ...},
     "generates": false where the model has no output head, else left out,
     "tensors": {name: {"dtype": ..., "shape": [...], "xxh3_128": ...}},
     "beside": {file: {name: ...}},
     "state": {"exp_avg.NAME": ...}, "run": {"steps": {name: count}, "groups": [...]}, where
              training state was written,
     "files": {file: {"nbytes": ..., "xxh3_128": ... unless it holds tensors}}}

Of version 1, or without one, digests are those of a tensor's row-major bytes; of version 2 they are
trees (`core.digests`), which is the same for tensors of at most 64 MiB.

It holds no path and no time of day: the same input gives the same bytes.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import xxhash
from msgspec import Struct

from reshard._version import __version__
from reshard.core.catalog import Origin
from reshard.core.locations import MANIFEST
from reshard.core.packed import pieces
from reshard.core.plan import Plan
from reshard.core.regex import regex
from reshard.core.state import TrainingState
from reshard.core.tensors import TensorSpec
from reshard.errors import FormatError, NotFoundError, PlanError, UnsupportedError
from reshard.storage import strict_json
from reshard.storage.local import Sources
from reshard.storage.paths import is_file

#: The version that is written, and the first whose digests are trees.
VERSION = TREES = 2
# Bytes that a stated tensor takes for each comma, colon and opening bracket of its lines.
_STATED_TOKEN_NBYTES = 45
_SURROGATE = regex("[\ud800-\udfff]")
# As many tensors can be listed, whatever models call theirs.
_FEW = 150_000
# Tensors whose lines are rendered at a time.
_LINES = 1000
# Bytes of a file that is copied, in memory at once.
_PIECE = 4 << 20


class Stated(Struct, frozen=True, gc=False, rename={"digest": "xxh3_128"}):
    """A tensor as `reshard.json` states it: dtype name, shape and digest (see above)."""

    dtype: str
    shape: tuple[int, ...]
    digest: str


class WrittenFile(Struct, frozen=True, omit_defaults=True, rename={"digest": "xxh3_128"}):
    """A file of the folder: its size and, unless it holds tensors, the xxh3-128 of its bytes."""

    nbytes: int
    digest: str = ""


class Manifest(Struct, frozen=True, omit_defaults=True):
    """The file: the tensors of the model and of each file beside it, the conversion's options, what
    it did to the names, and all other files of the folder; the moments in `state`, and the steps
    and groups of their optimizer in `run`."""

    reshard: str
    source: Mapping[str, Any]
    options: Mapping[str, Any]
    names: Mapping[str, Any]
    tensors: Mapping[str, Stated]
    beside: Mapping[str, Mapping[str, Stated]] = {}
    files: Mapping[str, WrittenFile] = {}
    version: int = 1
    generates: bool = True
    state: Mapping[str, Stated] = {}
    run: Mapping[str, Any] = {}


# The fields as they stand in the text, not parsed; empty where there is none.
_Fields = msgspec.defstruct(
    "_Fields", [(name, msgspec.Raw, msgspec.Raw(b"")) for name in Manifest.__struct_fields__]
)


class Table(Mapping[str, Stated]):
    """What `reshard.json` will state about each tensor of a table, made as it is asked for."""

    def __init__(
        self, specs: Iterable[TensorSpec], table: str, digests: Mapping[tuple[str, str], str]
    ) -> None:
        self._specs = {spec.name: spec for spec in sorted(specs, key=lambda spec: spec.name)}
        self._table = table
        self._digests = digests

    def __getitem__(self, name: str) -> Stated:
        spec = self._specs[name]
        return Stated(spec.dtype.name, spec.shape, self._digests[self._table, name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)


def render(
    source_format: str,
    origin: Origin,
    options: Mapping[str, Any],
    names: Mapping[str, Any],
    tensors: Mapping[str, Stated],
    beside: Mapping[str, Mapping[str, Stated]],
    files: Mapping[str, WrittenFile],
    *,
    generates: bool = True,
    state: Mapping[str, Stated] | None = None,
    run: Mapping[str, Any] | None = None,
) -> bytes:
    """The file's bytes."""
    source = {
        "format": source_format,
        "framework": origin.framework,
        "version": origin.version,
        "tag": origin.tag,
        "world_size": origin.world_size,
    }
    content = Manifest(
        __version__,
        source,
        options,
        names,
        _HELD if tensors else {},
        {name: dict(table) for name, table in beside.items()},
        files,
        VERSION,
        generates,
        _HELD if state else {},
        run or {},
    )
    try:
        text = msgspec.json.encode(content)
    except UnicodeEncodeError:
        # A tag or an option may hold bytes that are not UTF-8, which Python spells as surrogates.
        whole = json.dumps(msgspec.to_builtins(content), ensure_ascii=False)
        text = _SURROGATE.sub(lambda half: f"\\\\u{ord(half[0]):04x}", whole).encode()
    tables = [table for table in (tensors, state) if table]
    rendered = BytesIO()  # unlike a bytearray, it gives its bytes away without a copy
    for part in (msgspec.json.format(text, indent=1) + b"\n").split(_HELD_LINES):
        rendered.write(part)
        if tables:
            rendered.write(b" {\n")
            _put_lines(rendered, tables.pop(0))
            rendered.write(b"\n }")
    return rendered.getvalue()


def check_listable(specs: Sequence[TensorSpec]) -> None:
    """Raise `PlanError` for more tensors than a `reshard.json` can list that reshard reads, before
    anything is written.

    Memory: 120 bytes a tensor and their names.
    """
    if len(specs) <= _FEW:
        return
    text = BytesIO()
    _put_lines(text, Table(specs, "", defaultdict(lambda: "0" * 32)))
    try:
        strict_json.check_budget(text.getvalue(), MANIFEST, _STATED_TOKEN_NBYTES)
    except FormatError:
        raise PlanError(
            f"its {len(specs)} tensors are more than reshard lists in a {MANIFEST} that it can "
            "read again: about 280000 with short names, fewer with longer ones."
        ) from None


# Stands in the text for a table of tensors; no other value is spelt so.
_HELD: Mapping[str, Stated] = {"\0": Stated("", (), "")}
_HELD_LINES = msgspec.json.format(msgspec.json.encode({"": _HELD}), indent=1)[6:-2]


def _put_lines(text: BytesIO, table: Mapping[str, Stated]) -> None:
    """Append the lines of a table's tensors, some at a time: as one value they take 400 bytes a
    tensor, and the text of a whole table is held twice."""
    names = iter(table)
    separator = b""
    while chunk := list(islice(names, _LINES)):
        lines = msgspec.json.encode({"": {name: table[name] for name in chunk}})
        text.write(separator)
        text.write(msgspec.json.format(lines, indent=1)[9:-5])
        separator = b",\n"


def run_of(state: TrainingState) -> dict[str, Any]:
    """What is stated of an optimizer beside its tensors, as JSON values."""
    groups = [
        {"names": list(group.names), "hyperparameters": dict(group.hyperparameters)}
        for group in state.groups
    ]
    run = {"steps": {name: step.count for name, step in state.steps.items()}, "groups": groups}
    return strict_json.parse_object(msgspec.json.encode(run), MANIFEST)


def listed(plan: Plan, sources: Sources, copied: Mapping[str, str]) -> dict[str, WrittenFile]:
    """The files that a plan writes, by name; `copied` are the digests of those that are copied."""
    files = {file.name: WrittenFile(file.nbytes) for file in plan.files}
    for name, text in plan.texts:
        hasher = xxhash.xxh3_128()
        for piece in pieces(text):
            hasher.update(piece)
        files[name] = WrittenFile(len(text), hasher.hexdigest())
    for asset in plan.assets:
        files[asset.name] = WrittenFile(sources.open(asset.path).size, copied[asset.name])
    return dict(sorted(files.items()))


def file_digest(path: Path) -> str:
    """The xxh3-128 of a file's bytes, as `WrittenFile` states it."""
    hasher = xxhash.xxh3_128()
    with Sources() as sources:
        source = sources.open(path)
        for start in range(0, source.size, _PIECE):
            hasher.update(source.read(start, min(_PIECE, source.size - start)))
    return hasher.hexdigest()


def read(folder: Path, sources: Sources) -> Manifest:
    """What a folder's `reshard.json` states. Raises `NotFoundError`, `FormatError`."""
    path = folder / MANIFEST
    if not is_file(path):
        raise NotFoundError(
            f"it has no {MANIFEST}, so reshard did not write it.",
            path=folder,
            hint="Only folders that reshard wrote contain digests.",
        )
    text = strict_json.read_whole(sources.open(path), max_nbytes=strict_json.MAX_INDEX)
    return parsed(text, path)


def parsed(text: bytes, path: Path) -> Manifest:
    """What the text of a `reshard.json` states; `path` is its place. Raises `FormatError`."""
    try:
        manifest = _parse(text, str(path))
    except FormatError as error:
        raise FormatError(
            f"it is damaged: {error.message}", path=path, hint="Convert the checkpoint again."
        ) from None
    if manifest.version > VERSION:
        raise UnsupportedError(
            f"it is of version {manifest.version}; this reshard knows versions up to {VERSION}.",
            path=path,
            hint="Use the reshard that wrote it, or a later one.",
        )
    if not manifest.tensors and not any(manifest.beside.values()):
        raise FormatError(
            "it is damaged: it lists no tensor, so it proves nothing.",
            path=path,
            hint="Convert the checkpoint again.",
        )
    return manifest


def _parse(text: bytes, path: str) -> Manifest:
    """The manifest that a text is; its tensors are parsed straight into their type.

    Parsed as any other JSON, 200,000 tensors would take more than the budget. Raises `FormatError`.
    """
    strict_json.check_budget(text, path, _STATED_TOKEN_NBYTES)
    fields = strict_json.parse_as(text, _Fields, path)
    found: dict[str, Any] = {}
    members = 0
    for name in Manifest.__struct_fields__:
        raw = getattr(fields, name)
        if not bytes(raw):
            continue
        members += 1
        if name in ("tensors", "state"):
            found[name] = _compact(strict_json.parse_as(raw, dict[str, Stated], path))
            members += _members(found[name])
        elif name == "beside":
            found[name] = strict_json.parse_as(raw, dict[str, dict[str, Stated]], path)
            members += len(found[name]) + sum(map(_members, found[name].values()))
        else:
            found[name] = strict_json.parse(bytes(raw), path)
            members += strict_json.count_keys(bytes(raw))
    if not strict_json.has_keys(text, members):
        strict_json.parse(text, path)  # a key occurs twice, or a newer version has more fields
    try:
        return msgspec.convert(found, Manifest)
    except ValueError as error:
        raise FormatError(f"{error}.", path=path) from None


def _compact(tensors: dict[str, Stated]) -> dict[str, Stated]:
    """The same with one text for each dtype and one tuple for each shape: 120 bytes a tensor."""
    dtypes: dict[str, str] = {}
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {}
    for name, one in tensors.items():
        dtype = dtypes.setdefault(one.dtype, one.dtype)
        shape = shapes.setdefault(one.shape, one.shape)
        tensors[name] = Stated(dtype, shape, one.digest)
    return tensors


def _members(tensors: Mapping[str, Stated]) -> int:
    return len(tensors) * (1 + len(Stated.__struct_fields__))
