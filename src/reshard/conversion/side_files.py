"""The files beside the model, with their own tensors.

reward heads    reward_head.safetensors, reward_config.json and/or LightRFT's pytorch_model.bin
value head      value_head.safetensors, where it is not a class of the model
modules         the weights of the base's modules in sub-folders
adapter         adapter_model.safetensors and adapter_config.json
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from msgspec import Struct

from reshard.conversion.dtypes import OutputTensor, choose
from reshard.conversion.fitted import Fitted
from reshard.core.findings import Finding
from reshard.core.tensors import Entry, main_dtype
from reshard.errors import PlanError
from reshard.formats.info import output_format
from reshard.naming.backbone import has_head
from reshard.naming.lora import folder as adapter_files
from reshard.naming.lora.find import without_peft
from reshard.naming.rewards import (
    REWARD_CONFIG,
    REWARD_HEAD,
    ModelParts,
    RewardHeads,
    lightrft_state,
    reward_config,
)
from reshard.naming.search import unwrap
from reshard.naming.value_heads import VALUE_HEAD

LIGHTRFT = "pytorch_model.bin"
# Beside a merged model: in its root, transformers would apply the adapter a second time.
ADAPTER_FOLDER = "adapter/"


class SideFile(Struct, frozen=True):
    """A file beside the model, with its own tensors."""

    name: str
    tensors: Sequence[OutputTensor]


class SideFiles(Struct, frozen=True):
    """What one step puts beside the model: files of tensors, small files, and findings."""

    side_files: tuple[SideFile, ...] = ()
    texts: tuple[tuple[str, bytes], ...] = ()
    findings: tuple[Finding, ...] = ()

    def __add__(self, later: SideFiles) -> SideFiles:
        return SideFiles(
            (*self.side_files, *later.side_files),
            (*self.texts, *later.texts),
            (*self.findings, *later.findings),
        )


def side_files(fitted: Fitted) -> SideFiles:
    """Everything beside the model. Raises `PlanError` where the format has no place for it."""
    to = fitted.options.to
    made = _reward_files(fitted) + _value_head(fitted) + _modules(fitted) + _adapter(fitted)
    if made.side_files and not output_format(to).takes_files:
        raise PlanError(
            f"--to {to} has no place for {made.side_files[0].name}, which belongs beside a "
            "Hugging Face model.",
            hint="Leave out --base: every tensor then keeps its own name.",
        )
    return made


def _reward_files(fitted: Fitted) -> SideFiles:
    heads, choice = fitted.parts.rewards, fitted.options.rewards
    if heads is None:
        return SideFiles()
    if fitted.alone and choice.srm_format == "lightrft":
        raise PlanError(
            "LightRFT loads a state dict of the whole model, but this is only an adapter.",
            hint="Pass --lora merge, or --srm-format split.",
        )
    files = []
    if choice.srm_format in ("split", "both"):
        files.append(_side_file(fitted, REWARD_HEAD, heads.tensors.values()))
    if choice.srm_format in ("lightrft", "both") and not fitted.alone:
        files.append(SideFile(LIGHTRFT, _lightrft(fitted, heads)))
    config = reward_config(heads, choice.layer, fitted.base.config)
    message = (
        f"the heads are assumed to read hidden state {choice.layer}, LightRFT's default: no "
        "checkpoint states the layer."
    )
    assumed = (Finding("probing-layer-assumed", message),) if choice.probing_layer is None else ()
    return SideFiles(tuple(files), ((REWARD_CONFIG, _json(config)),), assumed)


def _lightrft(fitted: Fitted, heads: RewardHeads) -> list[OutputTensor]:
    """LightRFT's own state dict: every name of training, the backbone in the base's dtype.

    PEFT's prefix is removed: the adapters are merged, and LightRFT loads into an unwrapped model.
    """
    _check_complete(fitted)
    origins, dtype = fitted.name_map.origins, fitted.options.dtype
    merged = {origins[name]: made for name, made in fitted.updates.by_output.items()}
    merged.update(fitted.updates.by_source)
    backbone: dict[str, Entry] = {}
    for name, entry in lightrft_state(ModelParts(fitted.parts.backbone)).items():
        made = merged.get(entry.spec.name, merged.get(name, entry))
        for called in (name, *map(unwrap, entry.aliases)):
            plain = without_peft(called)
            backbone[plain] = made.renamed(plain)
    of_base = _main_dtype(fitted) if dtype == "base" else dtype
    return [
        *choose(list(backbone.items()), {}, of_base),
        *choose(list(heads.tensors.items()), {}, _kept(fitted)),
    ]


def _check_complete(fitted: Fitted) -> None:
    """LightRFT loads strictly: tensors that the checkpoint lacks have no training name here."""
    trained = has_head(fitted.parts.backbone)
    filled = fitted.name_map.matching.filled
    lacking = [name for name in filled if trained or not name.endswith("lm_head.weight")]
    if lacking:
        raise PlanError(
            f"the checkpoint lacks {len(lacking)} tensors of the state dict that LightRFT loads "
            f"strictly, such as {lacking[0]!r}.",
            hint="Pass --srm-format split.",
        )


def _value_head(fitted: Fitted) -> SideFiles:
    """A critic's head, where the model that is written does not have it."""
    head = fitted.parts.value
    if head is None or not (fitted.classes is None or fitted.alone):
        return SideFiles()
    return SideFiles((_side_file(fitted, VALUE_HEAD, head.called(head.name).values()),))


def _modules(fitted: Fitted) -> SideFiles:
    """The weights of the base's modules in sub-folders, in the dtypes that the base has."""
    files, findings = [], []
    for module in () if fitted.alone else fitted.base.modules:
        held = fitted.modules.get(module.file)
        if held is not None:
            made = choose(list(held.items()), module.tensors, fitted.options.dtype)
            files.append(SideFile(module.file, made))
        elif output_format(fitted.options.to).takes_files:
            message = f"{module.folder} is the base's: the checkpoint holds no tensor of it."
            findings.append(Finding("module-from-base", message, subject=module.folder))
    return SideFiles(tuple(files), findings=tuple(findings))


def _adapter(fitted: Fitted) -> SideFiles:
    scaling, base = fitted.adapters.config, fitted.base
    if scaling is None or not fitted.with_adapter:
        return SideFiles()
    folder = "" if fitted.alone else ADAPTER_FOLDER
    separated = fitted.separated
    names = adapter_files.named(scaling, base.folder, base.config)
    made = adapter_files.adapter_folder(separated, fitted.name_map.prefix, scaling, names)
    file = _side_file(fitted, folder + adapter_files.WEIGHTS, made.tensors.values())
    text = (folder + adapter_files.CONFIG, _json(made.config))
    findings = adapter_files.findings(made.config, separated.ranks)
    return SideFiles((file,), (text,), tuple(findings))


def _side_file(fitted: Fitted, name: str, entries: Iterable[Entry]) -> SideFile:
    items = [(entry.spec.name, entry) for entry in entries]
    return SideFile(name, choose(items, {}, _kept(fitted)))


def _main_dtype(fitted: Fitted) -> str:
    """The dtype of the base, which has tensors."""
    dtype = main_dtype(entry.spec for entry in fitted.base.entries.values())
    return "keep" if dtype is None else dtype.name


def _kept(fitted: Fitted) -> str:
    """The dtype of tensors that the base lacks: as stored, unless `--dtype` names one."""
    return "keep" if fitted.options.dtype == "base" else fitted.options.dtype


def _json(value: Mapping[str, object]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
