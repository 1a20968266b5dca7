"""Findings: what a user should know about a checkpoint, a conversion or a model.

A finding has a code, and `CODES` says once what each code means and how to fix it. Readers, the
fit of the names, the conversion, doctor and try all report findings of this one type; `--strict`
and `--json` speak of codes.
Adding one is a line in `CODES` and the place that reports it; `docs/findings.md` is made from here.
Long because it is one table, of a line or three for each code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from shlex import quote
from typing import Any, Literal

from msgspec import Struct, field
from msgspec.structs import force_setattr

from reshard.errors import listed, shortened, shown

#: `info`: nothing to do. `warning`: read it, the result may not be what was meant. `error`: the
#: result is wrong or unusable somewhere.
Severity = Literal["info", "warning", "error"]


# Characters of a message, at most.
_MAX_MESSAGE = 2000


class Code(Struct, frozen=True):
    """What a code means, in one line, and how to fix what it reports; no fix where none is due.

    `by` names the commands that report it of a model, `doctor` and `try`; empty: it is reported by
    readers, conversions and comparisons.
    """

    severity: Severity
    meaning: str
    fix: str = ""
    by: tuple[str, ...] = ()


class Finding(Struct, frozen=True):
    """Something that a user should know.

    `code` is a key of `CODES`. `message` is one or two sentences with the evidence. `subject` is
    the tensor or file concerned, empty for the whole checkpoint. `fix` says what to do in this
    case; empty: the code's own. `evidence` are names and numbers for programs, as JSON values.
    """

    code: str
    message: str
    subject: str = ""
    fix: str = ""
    evidence: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # A file decides how long a message is.
        force_setattr(self, "message", shortened(self.message, _MAX_MESSAGE))

    def __hash__(self) -> int:
        return hash((self.code, self.message, self.subject))  # evidence are a dict

    @property
    def severity(self) -> Severity:
        """How serious it is."""
        return CODES[self.code].severity

    def refused_by(self, strict: bool | Sequence[str]) -> bool:
        """Whether `--strict` refuses it: all but infos, or only the codes given."""
        if isinstance(strict, bool):
            return strict and self.severity != "info"
        return self.code in strict

    def __str__(self) -> str:
        return self.message

    def to_json(self) -> dict[str, Any]:
        """The finding as JSON values."""
        return {
            "code": self.code,
            "severity": self.severity,
            "subject": self.subject,
            "message": self.message,
            "fix": self.fix or CODES[self.code].fix,
            "evidence": dict(self.evidence),
        }


def objects_unread(names: Sequence[str]) -> Finding:
    """The finding that a pickle holds objects which are not data, by their classes; they were
    not made."""
    return Finding("objects-unread", f"objects that were skipped: {listed(names)}.")


def lists_left_out(names: Sequence[str]) -> Finding:
    """The finding that these lists of a checkpoint hold tensors, which have no names there."""
    message = f"tensors in lists have no names and were not read: {listed(names)}."
    return Finding("lists-left-out", message)


def part_left_out(name: str, count: int) -> Finding:
    """The finding that a part of a nested state dict with `count` tensors, by its dotted name,
    is not read."""
    message = f"beside the model it holds {shown(name)!r} (tensors: {count}), which is not read."
    fix = f"To convert it, pass --prefix {quote(shown(name))}."
    return Finding("part-left-out", message, shown(name), fix)


def state_named_by_order(count: int) -> Finding:
    """The finding that the state of `count` parameters has no names, and got theirs by order and
    shapes."""
    return Finding(
        "state-named-by-order",
        f"the optimizer's state has no names; reshard derived those of {count} parameters from "
        "the order and the shapes of the model's parameters, which match in only one way.",
    )


#: Every code, in alphabetical order.
CODES: dict[str, Code] = {
    "adapter-base-folder": Code(
        "info", "an adapter folder names its base by a local path",
        "On other machines, change base_model_name_or_path in adapter_config.json."),
    "adapter-not-served": Code(
        "warning", "vLLM and llama.cpp refuse an adapter of this kind",
        "To serve it, pass --lora merge."),
    "adapter-partly-zero": Code(
        "warning",
        "at least half of an adapter's rows are exact zeros: a rank's part may not have been saved",
        "Gather the parts of all ranks before saving, and convert that save."),
    "adapter-rank-for-vllm": Code(
        "warning", "vLLM accepts adapters of this rank only with --max-lora-rank"),
    "adapter-scales-differ": Code(
        "warning", "an engine would scale the adapter differently than PEFT does",
        "To serve it, pass --lora merge."),
    "adapter-setting-unknown": Code(
        "warning", "adapter_config.json has a setting that reshard does not know",
        "Compare the output with that of PEFT."),
    "adapter-zero": Code("warning", "the adapters change nothing: every lora_B is zero"),
    "adapters-alone": Code(
        "warning", "some trained tensors are not part of the adapter",
        "To write the whole model, pass --lora merge."),
    "adapters-unmerged": Code(
        "warning", "reshard wrote the adapters unmerged; no program loads such a file",
        "Pass --base."),
    "allow-unmatched": Code(
        "warning", "a pattern of --allow matches no name",
        "Correct the pattern, or leave it out."),
    "alpha-from-file": Code(
        "info", "alpha was read from an adapter_config.json beside the checkpoint"),
    "answer-repeats-token": Code("warning", "some long answers repeat one token", by=("try",)),
    "architecture-repaired": Code(
        "info", "the base's config has FSDP's class name; the output has the original class name"),
    "backbone-names": Code(
        "warning", "the names are those of a backbone, but the class has a head", by=("doctor",)),
    "base-config-fields": Code(
        "info", "the base's config lacks fields that released models have and engines read",
        "To write them: reshard doctor OUT --repair REPAIRED."),
    "base-layout": Code(
        "warning", "the base's names or tensor layouts differ from those of released models",
        "To write the layout of the released model, pass --names hub."),
    "chat-template-missing": Code("warning", "the chat template is missing", by=("doctor", "try")),
    "checkpoint-damaged": Code(
        "error", "a training checkpoint is incomplete or damaged", by=("doctor",)),
    "checkpoint-taken": Code(
        "info", "the path is a folder above the checkpoint; the message says which one was read"),
    "checkpoints-below": Code(
        "info", "an exported model was read, but there are training checkpoints below it",
        "To convert one of them, name its folder."),
    "code-missing": Code("error", "Python files that the config names are missing", by=("doctor",)),
    "codes-compared": Code(
        "info", "quantised weights of an unsupported kind were compared as stored"),
    "codes-left-out": Code(
        "warning", "quantised weights under adapters were left out; the base's weights were used"),
    "codes-unread": Code(
        "warning", "the weights are quantised in an unsupported way", by=("doctor",)),
    "codes-unreadable": Code("error", "scales of quantised weights are missing", by=("doctor",)),
    "config-fields-missing": Code(
        "warning", "the config lacks fields that released models have and engines read",
        by=("doctor",)),
    "config-missing": Code("error", "config.json is missing or cannot be read", by=("doctor",)),
    "consumed-samples-unknown": Code(
        "warning", "client_state.pt lacks what LightRFT's training needs to resume",
        "Pass --consumed-samples."),
    "copies-shared": Code(
        "info", "tensors that the trainer shares with another one are written once"),
    "damaged-file": Code(
        "error", "a weight file is truncated or breaks the rules of its format", by=("doctor",)),
    "dequantised": Code("info", "quantised weights are written dequantised"),
    "dtype-contradicts-config": Code(
        "warning", "the weights' dtype differs from the config's", by=("doctor",)),
    "engine-adapter": Code(
        "error", "an engine refuses the adapter, or scales it differently than PEFT",
        by=("doctor",)),
    "engine-class": Code(
        "error", "an engine does not know the class in the config", by=("doctor",)),
    "engine-config": Code("error", "an engine needs fields that the config lacks", by=("doctor",)),
    "engine-files": Code("error", "an engine reads the wrong weight files", by=("doctor",)),
    "engine-names": Code(
        "error", "an engine does not load these names or this layout", by=("doctor",)),
    "engine-names-unread": Code(
        "warning", "it is unknown whether an engine loads these names or this layout",
        by=("doctor",)),
    "engine-no-head": Code(
        "warning", "the model has no output head: an engine cannot generate with it",
        by=("doctor",)),
    "engine-score-bias": Code(
        "warning", "an engine adds a random bias to the head", by=("doctor",)),
    "engine-tensors": Code(
        "error", "tensors are missing, which an engine fills with random values, or refuses",
        by=("doctor",)),
    "engine-unknown-tensors": Code(
        "error", "an engine ignores or refuses some tensors", by=("doctor",)),
    "engine-weights": Code("error", "an engine does not load weights of this kind", by=("doctor",)),
    "export-beside": Code(
        "info", "a training checkpoint was read, and an exported model lies beside it",
        "To convert the exported model, name its file."),
    "flat-parameters-cut": Code(
        "warning",
        "flat parameters were split in the order of the model's family; no file states the order"),
    "from-cache": Code(
        "info", "a model was read from the Hugging Face cache; the message names the snapshot"),
    "fsdp-class": Code(
        "error", "the config has FSDP's class name, which transformers does not know",
        by=("doctor",)),
    "generation-config-missing": Code(
        "warning", "generation_config.json is missing", by=("doctor", "try")),
    "generation-loops": Code("warning", "the second half of a long answer is a loop", by=("try",)),
    "generation-outside-vocabulary": Code(
        "error", "an answer contains a token that the tokenizer does not have", by=("try",)),
    "generation-repeats-token": Code("error", "every long answer repeats one token", by=("try",)),
    "head-claimed": Code(
        "warning", "the config names a class with an output head, but the folder has no head",
        "In config.json, set architectures to the backbone's class, or use the model only for "
        "scores."),
    "head-contradicts-config": Code(
        "error", "the config ties the output head to the embedding, but their values differ",
        by=("doctor", "try")),
    "head-missing": Code("error", "the output head is missing", by=("doctor",)),
    "head-stored-twice": Code(
        "warning", "the output head is stored although it is tied to the embedding",
        by=("doctor", "try")),
    "head-untied": Code(
        "warning", "the output head differs from the embedding that it was tied to"),
    "hyperparameters-unknown": Code(
        "warning", "a hyperparameter was given that torch's AdamW ignores",
        "Correct its name, or leave it out."),
    "identical-to-base": Code(
        "error", "every tensor equals the base's: nothing was trained", by=("doctor",)),
    "in-memory-names": Code(
        "error", "the names are those of a loaded model, not those of the files", by=("doctor",)),
    "incomplete-skipped": Code(
        "warning", "the newest checkpoint is incomplete; an older one was read",
        "Copy the newest one again, or name the one to read."),
    "index-mismatch": Code("error", "the index does not match the files", by=("doctor",)),
    "layer-count": Code("error", "the number of layers differs from the config's", by=("doctor",)),
    "layers-beyond-base": Code(
        "info", "layers for multi-token prediction are written, although the base has none"),
    "layers-left-out": Code(
        "warning",
        "layers for multi-token prediction are left out, because the trainer has no names for "
        "them"),
    "layers-without-files": Code("info", "some layers of a pipeline have no file"),
    "lists-left-out": Code(
        "warning", "lists of the checkpoint hold tensors, which have no names; they were not read"),
    "logits-not-finite": Code("error", "the logits contain NaN or infinity", by=("try",)),
    "masters-missing": Code(
        "info", "some 16-bit tensors have no fp32 master; the model's values were used"),
    "masters-unnamed": Code(
        "warning", "the fp32 masters have no names; the 16-bit weights were read"),
    "memory-layout-apart": Code(
        "warning",
        "loaded models of some transformers versions need tensors that the output does not contain",
        "For a run with such a version, convert with --names memory."),
    "memory-layout-unknown": Code(
        "warning",
        "reshard does not know the names that loaded models of some transformers versions need"),
    "memory-names": Code("info", "the names are those of a loaded model, not those of the files"),
    "memory-names-added": Code(
        "info", "tensors also have the names that loaded models need; this adds no bytes"),
    "memory-version-unknown": Code(
        "warning", "reshard does not know the loaded models of this transformers version",
        "Check the names when you load the output, or pass --transformers-version."),
    "model-files-unchecked": Code(
        "info", "a training checkpoint was examined, which has no config and no tokenizer",
        by=("doctor",)),
    "module-from-base": Code(
        "info",
        "a module in a sub-folder of the base is not in the checkpoint and was copied from the "
        "base"),
    "names-do-not-fit": Code(
        "error", "tensors are missing, unexpected or of another shape", by=("doctor",)),
    "names-unknown": Code(
        "error", "tensors have names that the architecture does not have", by=("doctor",)),
    "names-without-weights": Code(
        "warning", "the checkpoint has names without weights",
        "Pass --fill-from-base."),
    "newer-export": Code(
        "info", "an exported model is newer than the checkpoint that was read",
        "To convert it, name it."),
    "no-adapters": Code(
        "warning", "an option for adapters was given, and the checkpoint holds none",
        "Leave the option out, or name the checkpoint that holds the adapters."),
    "no-base": Code("warning", "without --base, only weights are written", "Pass --base."),
    "no-checksums": Code("warning", "the files contain no checksums, so damage cannot be detected"),
    "no-output-head": Code("info", "the model has no output head and is not for generation"),
    "no-space": Code(
        "warning", "a dry run found too little free disk space for the output",
        "Free some space, or name an output on another disk."),
    "not-finite": Code(
        "warning",
        "weights contain NaN or infinity: the run diverged, or a buffer has such values by design",
        "Convert an earlier checkpoint of the run."),
    "not-resumed": Code("warning", "nothing from an interrupted run could be reused"),
    "objects-unread": Code(
        "warning", "a pickle contains objects that are not data; they were skipped"),
    "old-output-kept": Code(
        "warning", "the replaced output cannot be deleted completely",
        "Delete the rest yourself."),
    "old-output-restored": Code(
        "info", "a killed run had moved the old output aside; it was restored"),
    "one-shard": Code(
        "warning", "one shard of several was read",
        "For the whole model, name its folder."),
    "optimizer-left-out": Code("info", "the checkpoint also contains an optimizer's state"),
    "option-idle": Code("info", "an option has no effect on this conversion"),
    "output-unlike-architecture": Code(
        "warning", "the output lacks tensors of the architecture, or has extra ones"),
    "part-left-out": Code(
        "info", "the checkpoint contains another part that could be a model; it was not read",
        "To convert it, pass --prefix."),
    "part-missing": Code("error", "a part of the model (a tower) is missing", by=("doctor",)),
    "partial-output": Code("info", "the files of an interrupted run were removed"),
    "partial-output-kept": Code(
        "warning",
        "files beside the output look like those of an interrupted run; they were not removed",
        "Remove them if nobody needs them."),
    "pickled-weights": Code(
        "warning", "the weights are in torch.save files (pickles)", by=("doctor",)),
    "pieces-made-again": Code("info", "workers of the cluster were lost; others did their work"),
    "probing-layer-assumed": Code(
        "warning", "the hidden state that the reward heads read is an assumption",
        "Pass --probing-layer with the value used in training."),
    "processor-missing": Code(
        "error", "the image or audio processor is missing", by=("doctor", "try")),
    "quantisation-contradicts-config": Code(
        "error", "quantization_config contradicts the weights", by=("doctor",)),
    "quantisation-unfounded": Code(
        "warning", "the config says that weights are quantised, but they are not"),
    "replicas-missing": Code(
        "info",
        "files of some ranks are missing, but the others contain everything that they contained"),
    "resumed": Code("info", "an interrupted run of this conversion was continued"),
    "rounded": Code("info", "tensors are equal after one side is rounded"),
    "rounded-weights": Code(
        "warning", "the file contains rounded weights; the full-precision weights are beside it",
        "Name the folder that contains it."),
    "run-state-left-out": Code(
        "info", "counters or other state of the script have no place in the output"),
    "scales-left-over": Code(
        "error", "there are scales for weights that are not quantised", by=("doctor",)),
    "scheduler-left-out": Code(
        "warning",
        "the schedule's state was not written, because torch's schedulers cannot load it",
        "In the script that continues the run, set the schedule to the step in the report."),
    "settings-unread": Code(
        "warning", "a file with the run's settings cannot be read, so they were not checked"),
    "several-models": Code(
        "info",
        "the folder contains several models of one run; the message says which one was read",
        "To convert another, name it."),
    "shapes-differ": Code(
        "error", "shapes do not follow from the sizes in the config", by=("doctor",)),
    "shapes-unstated": Code(
        "warning", "the shards do not state full shapes, so missing last ranks cannot be detected",
        "Pass --base."),
    "state-alike": Code(
        "warning",
        "moments of two parameters are equal bit for bit: a file may be a copy of another one",
        "Copy the checkpoint again, or use another save."),
    "state-groups-by-rule": Code(
        "warning",
        "no file states which parameters belong to which group; Megatron's rules were used"),
    "state-left-out": Code(
        "warning", "a part of the training state is not plain data and was left out"),
    "state-masters-rounded": Code(
        "warning", "fp32 masters were rounded to the dtype of the output's weights",
        "Leave out --dtype."),
    "state-named-by-order": Code(
        "warning",
        "the optimizer's state has no names; they were derived from the order of the parameters",
        "Compare the first losses of the continued run with the last ones before."),
    "state-never-updated": Code(
        "info", "the optimizer's groups list parameters of which it holds no moments",
        "Freeze them in the run that continues: one that trains them asks for their moments."),
    "state-steps-differ": Code(
        "info", "parameters have different step counts, for example because some got no gradient"),
    "stray-head": Code(
        "error", "there is a head, but the class in the config has none", by=("doctor",)),
    "tensors-missing": Code("error", "tensors of the architecture are missing", by=("doctor",)),
    "tied-tensor-copied": Code("warning", "a tied tensor is missing; its partner was used"),
    "tokenizer-missing": Code("error", "the tokenizer is missing", by=("doctor",)),
    "tokenizer-too-large": Code(
        "warning", "the tokenizer has more tokens than the embedding", by=("doctor", "try")),
    "tokenizer-too-small": Code(
        "warning", "the embedding has over 1,024 more rows than the tokenizer has tokens",
        by=("try",)),
    "transposed-experts": Code("error", "stacked experts are transposed", by=("doctor",)),
    "unchanged": Code("warning", "every tensor equals the base model's: nothing was trained"),
    "universal-groups": Code(
        "info", "DeepSpeed matches the parameter groups of a universal checkpoint by position",
        "Create the script's parameter groups in this order."),
    "universal-loss-scale": Code(
        "info", "a universal checkpoint does not contain the loss scale of an fp16 run"),
    "universal-muon": Code(
        "warning", "DeepSpeed restores Muon's momentum incorrectly on several ranks",
        "Load it on one rank, or with offload_optimizer, by ZeRO stage 1 or 2."),
    "universal-no-schedule": Code(
        "info", "the universal checkpoint has no state of a schedule",
        "In a script with a schedule, pass load_lr_scheduler_states=False to load_checkpoint."),
    "universal-stage3": Code(
        "warning", "DeepSpeed's ZeRO stage 3 continues incorrectly from this universal checkpoint",
        "Load it with ZeRO stage 1 or 2, or run the code in docs/training-state.md after loading."),
    "universal-unlisted": Code(
        "warning", "a universal checkpoint holds parameters that its model files do not list",
        "The folder may be a mixture of two. Make the universal checkpoint again."),
    "universal-unrestored": Code(
        "warning",
        "DeepSpeed does not restore frozen parameters or buffers of a universal checkpoint",
        "Start the script with the weights that the run started from."),
    "untrained-layers": Code(
        "info", "loaded models do not have these layers; they were copied from the base"),
    "vectors-constant": Code(
        "info", "all values of a vector are equal, as in new biases and norms", by=("try",)),
    "verify-exchanged": Code(
        "warning",
        "the arguments of verify may be swapped: a checkpoint was verified against an output",
        "Name the output first: reshard verify OUT --against SRC."),
    "vocabulary-padded": Code(
        "info", "rows beyond the base's vocabulary were treated as Megatron's padding",
        "If the training added tokens, name a base with that vocabulary."),
    "vocabulary-size": Code(
        "error", "the vocabulary's size differs from the config's", by=("doctor",)),
    "weights-all-zero": Code(
        "error", "all values of a matrix are zero", by=("doctor", "try")),
    "weights-constant": Code(
        "error", "all values of a matrix are equal, and not zero", by=("doctor", "try")),
    "weights-large": Code(
        "warning", "a matrix is far larger than those of trained models", by=("doctor",)),
    "weights-missing": Code(
        "error", "a weight is missing from the files; transformers filled it with random values",
        by=("try",)),
    "weights-not-finite": Code("error", "weights are NaN or infinite", by=("doctor", "try")),
    "weights-not-safetensors": Code(
        "warning", "the weights are in another format and were not checked", by=("try",)),
    "weights-repeated": Code(
        "warning", "two matrices hold the same values: one may be a copy in the other's place",
        "Copy the checkpoint again, or use another save. Experts that were made of one layer are "
        "alike before they are trained.", by=("doctor",)),
    "weights-unexpected": Code(
        "error", "a tensor in the files does not belong to the model", by=("try",)),
    "weights-unread": Code(
        "info", "weight files beside the model were not read",
        "To convert one, name it."),
    "wrapper-prefix": Code(
        "error", "the names have a wrapper's or trainer's prefix", by=("doctor",)),
    "zero3-placeholders": Code(
        "error", "the files contain ZeRO-3 placeholders instead of weights", by=("doctor", "try")),
}  # fmt: skip
