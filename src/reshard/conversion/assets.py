"""The files of a base model that are copied with the weights.

Everything but the weights of the model itself: config, tokenizer, templates, code, and sub-folders
of these. Weights in a sub-folder with its own config belong to another module, and are copied too:

    modules.json                 sentence-transformers: which folder is which module
    1_Pooling/config.json
    2_Dense/config.json
    2_Dense/model.safetensors    the module's own weights

Links are followed where they lead into a model store (`storage.local.child`). A file that cannot be
read is an error: the output would be a model without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from reshard.core.catalog import Asset
from reshard.core.locations import MANIFEST
from reshard.core.regex import regex
from reshard.errors import FormatError, NotFoundError
from reshard.naming.lora.config import NAME as ADAPTER_CONFIG
from reshard.storage.local import child, read_start
from reshard.storage.paths import exists, is_file, is_folder, is_link, listing, real
from reshard.storage.places import MAX_DEPTH

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf",
                    ".onnx", ".onnx_data", ".onnx.data", ".distcp", ".tflite", ".ot", ".npz", ".pb",
                    ".pdparams", ".mlmodel")  # fmt: skip
# model.safetensors.index.json, model.safetensors.index.fp16.json; OpenVINO's graph of weights.
_WEIGHT_LISTS = regex(r".*\.index(\.\w+)?\.json|openvino_.*\.xml")
# PEFT's, whose weights are not copied: without them transformers cannot load the folder.
_LEFT = frozenset({ADAPTER_CONFIG, MANIFEST})
# Folders that tools leave beside a model; `.cache` is huggingface_hub's download record.
_NOT_ASSETS = frozenset({".git", ".cache", "__pycache__"})
# A module's own weights, as save_pretrained names them.
_OWN = regex(
    r"model(-\d{5}-of-\d{5})?\.safetensors|pytorch_model(-\d{5}-of-\d{5})?\.bin|"
    r"(model\.safetensors|pytorch_model\.bin)\.index\.json"
)
# What a training leaves in a folder of its own: an earlier model, not a part of this one.
_OF_TRAINING = frozenset({"trainer_state.json", "optimizer.pt", "training_args.bin", "latest",
                          ".metadata", ADAPTER_CONFIG})  # fmt: skip


def assets(folder: Path) -> tuple[Asset, ...]:
    """The files to copy, by name, sub-folders included.

    Raises `FormatError` for a link that leaves the folder or what is not a regular file,
    `NotFoundError` for a file or folder that cannot be read.
    """
    return tuple(
        Asset(path.relative_to(folder).as_posix(), path)
        for path in _walk(folder, folder, (real(folder),))
    )


def names_weights(name: str) -> bool:
    """Whether a file of this name holds weights, of whatever format."""
    return name.endswith(_WEIGHT_SUFFIXES)


def _walk(folder: Path, root: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    """The files below a folder that go along, in the order of their names.

    `above` are the folders that lead here, links followed.
    """
    if len(above) > MAX_DEPTH:
        raise NotFoundError(f"folders nest deeper than {MAX_DEPTH} levels.", path=folder)
    names = set(_names(folder))
    module = folder != root and "config.json" in names and not names & _OF_TRAINING
    for name in sorted(names - _NOT_ASSETS):
        path = folder / name
        weights = names_weights(name) or _WEIGHT_LISTS.fullmatch(name) is not None
        if name in _LEFT or (weights and not (module and _OWN.fullmatch(name))):
            continue
        if is_link(path):
            child(folder, name, store=True)
        if is_folder(path):
            if real(path) not in above:  # a link to a folder above would never end
                yield from _walk(path, root, (*above, real(path)))
        else:
            _check_readable(path)
            yield path


def _names(folder: Path) -> list[str]:
    try:
        return [entry.name for entry in listing(folder)]
    except NotFoundError as error:
        raise _unreadable(folder, error) from None


def _check_readable(path: Path) -> None:
    """Raise unless it is a regular file that can be opened; a named pipe is not waited for."""
    if exists(path) and not is_file(path):
        raise FormatError(
            "it is not a regular file, so it cannot be copied with the model.",
            path=path,
            hint="Remove it, or put the file itself there.",
        )
    try:
        read_start(path, 0)
    except NotFoundError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: NotFoundError) -> NotFoundError:
    return NotFoundError(
        f"it belongs to the base model, and {error.message}",
        path=path,
        hint="Make it readable, or remove it from the folder if the model does not need it.",
    )
