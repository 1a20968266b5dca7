"""The files that go along with the weights: tokenizer, processor, chat template, code."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from msgspec import Struct

from reshard.conversion.base_model import CONFIG, Base
from reshard.diagnosis import tokens
from reshard.diagnosis.folder import Folder, read_json
from reshard.storage.local import Sources

TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
# Any one of these holds a vocabulary (transformers 5.23, the tokenizers' `vocab_files_names`).
_VOCABULARIES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model",
    "sentencepiece.bpe.model", "spm.model", "tekken.json", "tiktoken.model", "*.tiktoken",
)  # fmt: skip
_TOKENIZER = (*_VOCABULARIES, TOKENIZER_CONFIG, "merges.txt", "special_tokens_map.json",
              "added_tokens.json", "tokenization_*.py")  # fmt: skip
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_PROCESSOR = (*_PROCESSORS, "video_preprocessor_config.json", "processing_*.py",
              "image_processing_*.py")  # fmt: skip
# Where a chat template may stand, in the order in which transformers 5.23 looks.
_TEMPLATES = (
    ("chat_template.jinja", None),
    ("chat_template.json", "chat_template"),
    ("processor_config.json", "chat_template"),
    (TOKENIZER_CONFIG, "chat_template"),
)


class Template(Struct, frozen=True):
    """A chat template: the file it stands in, and its value where that file is JSON."""

    file: str
    value: object = None


class Companions(Struct, frozen=True):
    """What was read of such files, of the folder and of the base.

    tokens: one more than the largest token id of `tokenizer.json`; None where there is none.
    modules: files of Python code that the config's `auto_map` names.
    """

    template: Template | None = None
    base_template: Template | None = None
    tokenizer_config: Mapping[str, Any] | None = None
    tokens: int | None = None
    base_tokens: int | None = None
    modules: frozenset[str] = frozenset()


def read_companions(folder: Folder, base: Base | None, sources: Sources) -> Companions:
    """Read what the checks need of the small files. A file that cannot be read counts as empty."""
    base_files = frozenset(asset.name for asset in base.assets) if base else frozenset()
    return Companions(
        template=_template(folder.path, frozenset(folder.assets), sources),
        base_template=_template(base.folder, base_files, sources) if base else None,
        tokenizer_config=read_json(folder.path, TOKENIZER_CONFIG, sources)[0],
        tokens=tokens.count(folder.path, sources),
        base_tokens=tokens.count(base.folder, sources) if base else None,
        modules=_modules(read_json(folder.path, CONFIG, sources)[0] or {}),
    )


def is_vocabulary(name: str) -> bool:
    """Whether a file of this name holds a tokenizer's vocabulary."""
    return any(fnmatchcase(name, pattern) for pattern in _VOCABULARIES)


def is_tokenizer(name: str) -> bool:
    """Whether a file of this name belongs to a tokenizer."""
    return any(fnmatchcase(name, pattern) for pattern in _TOKENIZER)


def is_processor(name: str, *, enough: bool = False) -> bool:
    """Whether a file of this name belongs to a processor; with `enough`, whether it suffices."""
    return any(fnmatchcase(name, pattern) for pattern in (_PROCESSORS if enough else _PROCESSOR))


def _template(path: Path, files: frozenset[str], sources: Sources) -> Template | None:
    for name, key in _TEMPLATES:
        if name not in files:
            continue
        if key is None:
            return Template(name)
        value = (read_json(path, name, sources)[0] or {}).get(key)
        if value:
            return Template(name, value)
    return None


def _modules(config: Mapping[str, Any]) -> frozenset[str]:
    """`auto_map` names `module.Class`, or `repository--module.Class` for code that stays away."""
    auto_map = config.get("auto_map")
    references: list[object] = []
    for value in auto_map.values() if isinstance(auto_map, dict) else ():
        references += value if isinstance(value, list) else [value]
    return frozenset(
        reference.rpartition(".")[0].replace(".", "/") + ".py"
        for reference in references
        if isinstance(reference, str) and "." in reference and "--" not in reference
    )
