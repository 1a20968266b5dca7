"""Loading a model: the class that its own config names, its tokenizer, its processor.

transformers loads a folder whose names or shapes do not fit with no more than a warning, and
fills the gaps with random numbers. `Loaded.gaps` keeps what it reports.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from reshard.errors import NamesError, UnsupportedError
from reshard.evaluate.device import Placement
from reshard.evaluate.folder import Folder, ModelKind
from reshard.evaluate.report import Model
from reshard.evaluate.reward import ScalarReward, load_reward
from reshard.naming.quantised.stated import statement


@dataclass(frozen=True, slots=True)
class Gaps:
    """Where the weights and the class did not fit: each a sorted list of tensor names."""

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model ready to run. `core` is the transformers model; for a scalar reward model the
    backbone of `reward`."""

    folder: Folder
    core: Any
    reward: ScalarReward | None
    inputs: str
    gaps: Gaps
    seconds: float

    def place(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Inputs on the model's first device, floating ones in its dtype.

        Some tokenizers make `token_type_ids` for every model; those that a model does not take
        are left out, as its `generate` would refuse them.
        """
        takes = inspect.signature(self.core.forward).parameters
        return {
            name: value.to(self.inputs, self.core.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
            if name != "token_type_ids" or name in takes
        }

    def facts(self, chat_template: bool) -> Model:
        """What the report says about the model."""
        parameters = list((self.reward or self.core).parameters())
        dtypes = Counter[str]()
        for parameter in parameters:
            dtypes[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
        stated = statement(self.folder.config)
        return Model(
            kind=self.folder.kind.value,
            architecture=type(self.core).__name__,
            model_type=self.folder.model_type,
            parameters=sum(dtypes.values()),
            dtypes=dict(dtypes),
            devices=tuple(sorted({str(parameter.device) for parameter in parameters})),
            chat_template=chat_template,
            load_seconds=self.seconds,
            quantisation=None if stated is None else stated.title,
        )


def load_model(folder: Folder, placement: Placement, *, dtype: str, remote_code: bool) -> Loaded:
    """Load the model of `folder` for inference.

    `dtype` is one of `options.DTYPES`; `auto` is what the folder's config names. Raises
    `UnsupportedError` for a class that the installed transformers does not have and `NamesError`
    for weights whose shapes are not those of the config; whatever `from_pretrained` raises
    passes through.
    """
    began = time.perf_counter()
    core, info = _class_of(folder, remote_code).from_pretrained(
        folder.path,
        device_map=placement.device_map,
        trust_remote_code=remote_code,
        output_loading_info=True,
        # Otherwise the shapes that do not fit are only logged; _check_shapes raises with them.
        ignore_mismatched_sizes=True,
        local_files_only=True,
        **{_dtype_argument(): dtype if dtype == "auto" else getattr(torch, dtype)},
    )
    _check_shapes(folder, info)
    core.eval()
    reward = load_reward(folder.path, core) if folder.kind is ModelKind.REWARD else None
    gaps = _gaps(folder, info)
    inputs = _first_device(core) or placement.inputs
    return Loaded(folder, core, reward, inputs, gaps, time.perf_counter() - began)


def _first_device(core: Any) -> str | None:
    """Where a model that accelerate spread over devices takes its inputs: at its embedding, which
    need not be on the first GPU. None for a model in one place."""
    hook = getattr(core, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    if device is None or getattr(core, "hf_device_map", None) is None:
        return None
    return f"cuda:{device}" if isinstance(device, int) else str(device)


def _class_of(folder: Folder, remote_code: bool) -> Any:
    """The class to load: the named one, or the automatic class of the folder's kind."""
    own = folder.config.get("auto_map")
    if isinstance(own, dict) and remote_code:
        classes = (_automatic(folder.kind).__name__, "AutoModelForCausalLM", "AutoModel")
        named = next((name for name in classes if name in own), classes[0])
        return getattr(transformers, named)
    if folder.kind is ModelKind.REWARD and not folder.takes_audio:
        # LightRFT trains its vision-language reward models on the backbone without a head
        # (lightrft/models/srm_vl.py: AutoModel), those for audio on the whole class (srm_al.py).
        return transformers.AutoModel
    if folder.architecture is None:
        return _automatic(folder.kind)
    named = getattr(transformers, folder.architecture, None)
    if named is not None:
        return named
    if own is not None:
        raise UnsupportedError(
            f"{folder.architecture} is code that lies in the model's folder.",
            path=folder.path,
            hint="Read that code, then allow it with --trust-remote-code.",
        )
    version = importlib.metadata.version("transformers")
    raise UnsupportedError(
        f"transformers {version} has no class {folder.architecture}.",
        path=folder.path / "config.json",
        hint="Install the version that the model was trained with.",
    )


def _automatic(kind: ModelKind) -> Any:
    if kind is ModelKind.VISION:
        return transformers.AutoModelForImageTextToText
    if kind is ModelKind.CLASSIFIER:
        return transformers.AutoModelForSequenceClassification
    if kind is ModelKind.AUDIO:
        # transformers 4 has no automatic class for audio and text.
        return getattr(transformers, "AutoModelForMultimodalLM", transformers.AutoModel)
    return transformers.AutoModel if kind is ModelKind.REWARD else transformers.AutoModelForCausalLM


def _dtype_argument() -> str:
    """`from_pretrained` takes `dtype` since transformers 4.56, before that `torch_dtype`."""
    major, minor = importlib.metadata.version("transformers").split(".")[:2]
    return "dtype" if (int(major), int(minor)) >= (4, 56) else "torch_dtype"


def _check_shapes(folder: Folder, info: Mapping[str, Any]) -> None:
    mismatched = sorted(info.get("mismatched_keys") or ())
    if not mismatched:
        return
    shown = "; ".join(
        f"{name} is {list(stored)} in the files, {list(expected)} by the config"
        for name, stored, expected in mismatched[:3]
    )
    raise NamesError(
        f"{len(mismatched)} weights have another shape than the config says: {shown}.",
        unexpected=tuple(name for name, *_ in mismatched),
        path=folder.path / "config.json",
        hint="The config is that of another model.",
    )


def _gaps(folder: Folder, info: Mapping[str, Any]) -> Gaps:
    unexpected = sorted(info.get("unexpected_keys") or ())
    if folder.kind is ModelKind.REWARD:
        # The backbone's class has no language head; an export may hold the base model's.
        unexpected = [name for name in unexpected if not name.endswith("lm_head.weight")]
    return Gaps(tuple(sorted(info.get("missing_keys") or ())), tuple(unexpected))


def load_tokenizer(path: Path, *, remote_code: bool) -> Any:
    """The folder's tokenizer; whatever transformers raises passes through."""
    return transformers.AutoTokenizer.from_pretrained(
        path, trust_remote_code=remote_code, local_files_only=True
    )


def quiet() -> None:
    """Keep transformers' own progress bars and warnings off the terminal: the report says it."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
