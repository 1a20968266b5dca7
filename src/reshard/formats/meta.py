"""Meta's own checkpoints of Llama: a torch.save file with the weights, and the model's sizes.

    consolidated.00.pth     {"tok_embeddings.weight": .., "layers.0.attention.wq.weight": ..}
    params.json             {"dim": 4096, "n_layers": 32, "n_heads": 32, ..}
    tokenizer.model

Larger models have several files, the parts of as many GPUs, which are not read. Names stay Meta's
here; `reshard.naming.titan` maps them to the hub's, `reshard.naming.meta` back. Read off Meta's
llama and llama3 (llama/model.py, generation.py) and llama-models (models/llama3).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reshard.containers import torch as torchfile
from reshard.containers.torch import TensorRef
from reshard.containers.torch.named import entries_of
from reshard.containers.torch.write import lay_out_state_dict
from reshard.core.catalog import Catalog, Origin
from reshard.core.findings import Finding, objects_unread
from reshard.core.plan import OutputFile
from reshard.errors import UnsupportedError
from reshard.formats import Selection, TensorToWrite
from reshard.formats.signs import META_FILE, is_meta
from reshard.naming.meta import PARAMS
from reshard.storage import strict_json
from reshard.storage.local import Sources
from reshard.storage.paths import is_file, listing

_FILE = "consolidated.00.pth"


def detect(path: Path) -> str | None:
    """A file called as Meta calls them, or a folder of such files."""
    return "it holds consolidated.*.pth" if is_meta(path) else None


def read(path: Path, sources: Sources, selection: Selection) -> Catalog:
    """The tensors by Meta's names; `details` have what `params.json` states.

    Raises `UnsupportedError` where there are several files, or no state dict in the file.
    """
    folder = path.parent if is_file(path) else path
    files = sorted(file for file in listing(folder) if META_FILE.fullmatch(file.name))
    if len(files) > 1:
        raise UnsupportedError(
            f"it is of {len(files)} files, each with the part of one GPU (model parallelism); one "
            "file with the whole model is read.",
            path=folder,
            hint="Convert the model as the hub has it.",
        )
    content = torchfile.read(sources.open(files[0]))
    value = content.value if isinstance(content.value, dict) else {}
    tensors = {n: t for n, t in value.items() if isinstance(n, str) and isinstance(t, TensorRef)}
    if not tensors or len(tensors) < len(value):
        raise UnsupportedError(
            "it holds something else than a dict of names to tensors.", path=files[0]
        )
    findings = [Finding("no-checksums", said, files[0].name) for said in content.warnings]
    if content.opaque:
        findings.append(objects_unread(content.opaque))
    return Catalog(
        format="meta",
        origin=Origin(root=folder, framework="Meta's Llama", details=_stated(folder, sources)),
        entries=entries_of(tensors),
        records=content.records,
        findings=tuple(findings),
    )


def _stated(folder: Path, sources: Sources) -> dict[str, Any]:
    """What the folder's `params.json` says; nothing where there is none."""
    path = folder / PARAMS
    if not is_file(path):
        return {}
    stated = strict_json.read_object(sources.open(path))
    return {"params": {k: v for k, v in stated.items() if isinstance(v, bool | int | float | str)}}


def lay_out(
    slots: Sequence[TensorToWrite], max_file_nbytes: int
) -> tuple[tuple[OutputFile, ...], tuple[tuple[str, bytes], ...]]:
    """One file, of whatever size: several would be the parts of GPUs."""
    return (lay_out_state_dict([spec for spec, _, _ in slots]).file(_FILE, slots),), ()
