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
    """That a pickle holds objects which are not data, by their classes; they were not made."""
    return Finding("objects-unread", f"objects that were left unread: {listed(names)}.")


def part_left_out(name: str, count: int) -> Finding:
    """That a part of a nested state dict with `count` tensors, by its dotted name, is not read."""
    message = f"beside the model it holds {shown(name)!r} (tensors: {count}), which is not read."
    fix = f"To convert it, pass --prefix {quote(shown(name))}."
    return Finding("part-left-out", message, shown(name), fix)


def state_named_by_order(count: int) -> Finding:
    """That the state of `count` parameters has no names, and got theirs by order and shapes."""
    return Finding(
        "state-named-by-order",
        f"the optimizer's state has no names; that of {count} parameters was given theirs by the "
        "order and the shapes of the model's parameters, which fit in one way only.",
    )


#: Every code, in alphabetical order.
CODES: dict[str, Code] = {
    "adapter-base-folder": Code(
        "info", "an adapter folder names its base by a folder of this machine",
        "Where the base lies elsewhere, change base_model_name_or_path in adapter_config.json."),
    "adapter-not-served": Code(
        "warning", "vLLM and llama.cpp refuse an adapter of this kind",
        "To serve it, pass --lora merge."),
    "adapter-partly-zero": Code(
        "warning", "half of an adapter's rows or more are exact zeros: a part may not be saved",
        "Gather every rank's part before saving, and convert that."),
    "adapter-rank-for-vllm": Code(
        "warning", "vLLM accepts adapters of this rank only with a flag"),
    "adapter-scales-differ": Code(
        "warning", "an engine would scale the adapter differently than PEFT does",
        "To serve it, pass --lora merge."),
    "adapter-setting-unknown": Code(
        "warning", "adapter_config.json has a setting that is not known here",
        "Compare the output with PEFT's."),
    "adapter-zero": Code("warning", "the adapters change nothing: every lora_B is zero"),
    "adapters-alone": Code(
        "warning", "the adapter does not hold tensors that differ from the base's",
        "To write the whole model, pass --lora merge."),
    "adapters-unmerged": Code(
        "warning", "adapters were written as they are, into a file that no program loads",
        "Pass --base."),
    "allow-unmatched": Code(
        "warning", "a pattern of --allow matches no name",
        "Correct the pattern, or leave it out."),
    "alpha-from-file": Code("info", "alpha was read from an adapter_config.json near the run"),
    "answer-repeats-token": Code(
        "warning", "some long answers are one token over and over", by=("try",)),
    "architecture-repaired": Code(
        "info", "the base's config had FSDP's class name; the output has the class's own name"),
    "backbone-names": Code(
        "warning", "names are those of the backbone, under a class with a head", by=("doctor",)),
    "base-config-fields": Code(
        "info", "the base's config lacks fields that releases have and engines read",
        "To write them: reshard doctor OUT --repair REPAIRED."),
    "base-layout": Code(
        "warning", "the base's names or orientation are those of no release",
        "For the layout of the release, pass --names hub."),
    "chat-template-missing": Code("warning", "the chat template is missing", by=("doctor", "try")),
    "checkpoint-damaged": Code(
        "error", "a training checkpoint is incomplete or damaged", by=("doctor",)),
    "checkpoint-taken": Code("info", "the path names a folder above; which checkpoint was read"),
    "checkpoints-below": Code(
        "info", "an exported model was read, and training checkpoints lie below it",
        "To convert one of them, name its folder."),
    "code-missing": Code("error", "code that the config names is missing", by=("doctor",)),
    "codes-compared": Code(
        "info", "quantised weights of a kind that is not read were compared as they are stored"),
    "codes-left-out": Code(
        "warning", "quantised weights under adapters were left out; the base's were taken"),
    "codes-unread": Code(
        "warning", "the weights are codes of a kind that is not read", by=("doctor",)),
    "codes-unreadable": Code("error", "quantised weights lack their scales", by=("doctor",)),
    "config-fields-missing": Code(
        "warning", "the config lacks fields that releases have and engines read", by=("doctor",)),
    "config-missing": Code("error", "config.json is missing or cannot be read", by=("doctor",)),
    "consumed-samples-unknown": Code(
        "warning", "client_state.pt lacks what LightRFT's training needs to resume",
        "Pass --consumed-samples."),
    "copies-shared": Code(
        "info", "copies that the trainer shares with another tensor are not written"),
    "damaged-file": Code(
        "error", "a weight file is cut off or breaks its format's rules", by=("doctor",)),
    "dequantised": Code(
        "info", "quantised weights are written as the numbers that they represent"),
    "dtype-contradicts-config": Code(
        "warning", "the weights' dtype is not the config's", by=("doctor",)),
    "engine-adapter": Code(
        "error", "an engine refuses the adapter, or scales it otherwise", by=("doctor",)),
    "engine-class": Code("error", "an engine has no class of this name", by=("doctor",)),
    "engine-config": Code(
        "error", "an engine asks for fields that the config lacks", by=("doctor",)),
    "engine-files": Code(
        "error", "an engine reads weight files that are not the model's, or not those that are",
        by=("doctor",)),
    "engine-names": Code(
        "error", "an engine does not take the names or the layout", by=("doctor",)),
    "engine-names-unread": Code(
        "warning", "whether an engine takes the names or the layout is not known", by=("doctor",)),
    "engine-no-head": Code(
        "warning", "a model without an output head: an engine cannot generate with it",
        by=("doctor",)),
    "engine-score-bias": Code(
        "warning", "an engine gives the head a bias that no file has", by=("doctor",)),
    "engine-tensors": Code(
        "error", "an engine lacks tensors, and makes them up or refuses", by=("doctor",)),
    "engine-unknown-tensors": Code("error", "an engine drops or refuses tensors", by=("doctor",)),
    "engine-weights": Code("error", "an engine does not read weights of this kind", by=("doctor",)),
    "export-beside": Code(
        "info", "a training checkpoint was read, and an exported model lies beside it",
        "To convert the exported model, name its file."),
    "flat-parameters-cut": Code(
        "warning",
        "flat parameters were cut in the order of the model's family, which no file states"),
    "from-cache": Code("info", "a model was read from the Hugging Face cache; which snapshot"),
    "fsdp-class": Code(
        "error", "the config has FSDP's name of a class, which transformers does not know",
        by=("doctor",)),
    "generation-config-missing": Code(
        "warning", "generation_config.json is missing", by=("doctor", "try")),
    "generation-loops": Code("warning", "the last half of a long answer is a loop", by=("try",)),
    "generation-outside-vocabulary": Code(
        "error", "an answer holds a token that the tokenizer does not have", by=("try",)),
    "generation-repeats-token": Code(
        "error", "every long answer is one token over and over", by=("try",)),
    "head-claimed": Code(
        "warning", "the config names a class with an output head, which the folder does not have",
        "Name the backbone's own class in config.json's architectures, or serve it only to score."),
    "head-contradicts-config": Code(
        "error", "the config ties a head that is not the embedding", by=("doctor", "try")),
    "head-missing": Code("error", "the output head is missing", by=("doctor",)),
    "head-stored-twice": Code(
        "warning", "the output head is stored although it is the embedding", by=("doctor", "try")),
    "head-untied": Code("warning", "an output head differs from the embedding that it was tied to"),
    "hyperparameters-unknown": Code(
        "warning", "torch's AdamW does not have a given hyperparameter, and ignores it",
        "Correct its name, or leave it out."),
    "identical-to-base": Code(
        "error", "the weights are the base's: nothing was trained", by=("doctor",)),
    "in-memory-names": Code(
        "error", "names are those of a loaded model, not those of the files", by=("doctor",)),
    "incomplete-skipped": Code(
        "warning", "a newer checkpoint is incomplete; an older one was read",
        "Copy the newer one again, or name the one to read."),
    "index-mismatch": Code("error", "the index does not match the files", by=("doctor",)),
    "layer-count": Code("error", "the layers are not as many as the config says", by=("doctor",)),
    "layers-beyond-base": Code(
        "info", "layers for multi-token prediction are written, of which the base has none"),
    "layers-left-out": Code(
        "warning", "layers for multi-token prediction are not written in the trainer's names"),
    "layers-without-files": Code(
        "info", "some layers of a pipeline have no file"),
    "logits-not-finite": Code("error", "the logits of a step hold NaN or infinity", by=("try",)),
    "masters-missing": Code(
        "info", "some 16-bit tensors have no fp32 master, and are as the model holds them"),
    "masters-unnamed": Code(
        "warning", "the fp32 masters are stored without names; 16-bit weights were read"),
    "memory-layout-apart": Code(
        "warning", "loaded models of some versions hold tensors that the folder has no bytes for",
        "For a run of such a version, convert with --names memory."),
    "memory-layout-unknown": Code(
        "warning", "the names that loaded models of some versions ask for are not known"),
    "memory-names": Code("info", "names are those of a loaded model, not those of the files"),
    "memory-names-added": Code(
        "info", "tensors also have the names that loaded models ask for, without further bytes"),
    "memory-version-unknown": Code(
        "warning", "the loaded models of the named transformers version are not known",
        "Load the output with strict names, or name the version with --transformers-version."),
    "model-files-unchecked": Code(
        "info", "a training checkpoint was examined, which has no config and no tokenizer",
        by=("doctor",)),
    "module-from-base": Code(
        "info", "a module in a sub-folder of the base was not in the checkpoint and is the base's"),
    "names-do-not-fit": Code(
        "error", "tensors are missing, left over or of another shape", by=("doctor",)),
    "names-unknown": Code(
        "error", "tensors have names that no class of the architecture has", by=("doctor",)),
    "names-without-weights": Code(
        "warning", "the checkpoint has names without weights", "Pass --fill-from-base."),
    "newer-export": Code(
        "info", "an exported model is newer than the checkpoint that was read",
        "To convert it, name it."),
    "no-adapters": Code(
        "warning", "an option for adapters was given, and the checkpoint holds none",
        "Leave the option out, or name the checkpoint that holds the adapters."),
    "no-base": Code(
        "warning", "without a base, only weights are written", "Pass --base."),
    "no-checksums": Code("warning", "the files have no checksums: damage cannot be detected"),
    "no-output-head": Code("info", "the model has no output head and is not for generation"),
    "no-space": Code(
        "warning", "a dry run found that the disk has no room for the output",
        "Make room or name an output on another disk."),
    "not-finite": Code(
        "warning", "weights hold NaN or infinity: the run has diverged, or a buffer is made so",
        "Convert an earlier checkpoint of the run."),
    "not-resumed": Code(
        "warning", "nothing of an interrupted run of this output could be reused"),
    "objects-unread": Code(
        "warning", "a pickle holds objects that are not data; they were not made"),
    "old-output-kept": Code(
        "warning", "the output that was replaced cannot be deleted entirely",
        "Delete what is left of it."),
    "old-output-restored": Code(
        "info", "a killed run had moved the old output aside; it was put back"),
    "one-shard": Code(
        "warning", "one shard of several was read", "For the whole model, name its folder."),
    "optimizer-left-out": Code(
        "info", "the checkpoint also holds the state of an optimizer"),
    "option-idle": Code("info", "an option has no effect on this conversion"),
    "output-unlike-architecture": Code(
        "warning", "what is written lacks tensors of the architecture, or has more"),
    "part-left-out": Code(
        "info", "the checkpoint holds another part that could be a model, and it was not read",
        "To convert it, pass --prefix."),
    "part-missing": Code("error", "a whole part of the model is missing", by=("doctor",)),
    "partial-output": Code("info", "what an interrupted run of this output left was removed"),
    "partial-output-kept": Code(
        "warning", "something beside the output looks like a run's leftover and was not removed",
        "Remove it, if nobody needs it."),
    "pickled-weights": Code("warning", "the weights are in torch.save files", by=("doctor",)),
    "pieces-made-again": Code(
        "info", "workers of the cluster were lost, and others did their work"),
    "probing-layer-assumed": Code(
        "warning", "which hidden state the reward heads read was assumed",
        "Pass --probing-layer with the value of the training."),
    "processor-missing": Code(
        "error", "the image or audio processor is missing", by=("doctor", "try")),
    "quantisation-contradicts-config": Code(
        "error", "the config contradicts the quantisation of the weights", by=("doctor",)),
    "quantisation-unfounded": Code(
        "warning", "the config says that weights are quantised, and they are not"),
    "replicas-missing": Code(
        "info", "files of some ranks are missing; the others hold all that they held"),
    "resumed": Code("info", "an interrupted run of this conversion was continued"),
    "rounded": Code("info", "tensors of two checkpoints are equal once one side is rounded"),
    "rounded-weights": Code(
        "warning", "the file holds rounded weights; those in full precision lie beside it",
        "Name the folder that holds it."),
    "run-state-left-out": Code(
        "info", "counters or a user's state of the run have no place in the output"),
    "scales-left-over": Code(
        "error", "scales lie beside weights that are not quantised", by=("doctor",)),
    "scheduler-left-out": Code(
        "warning", "the schedule's state was not written: torch's schedulers would not take it",
        "Set the schedule in the script that goes on, at the step that the report states."),
    "settings-unread": Code(
        "warning", "a file with the run's settings cannot be read; they were not compared"),
    "several-models": Code(
        "info", "the folder holds several models of one run; which one was read",
        "To convert another, name it."),
    "shapes-differ": Code("error", "shapes are not what the config's sizes make", by=("doctor",)),
    "shapes-unstated": Code(
        "warning", "the shards do not state full shapes: missing last ranks cannot be noticed",
        "Pass --base."),
    "state-alike": Code(
        "warning", "moments of two parameters are equal bit for bit: a file may be a copy of "
        "another's", "Copy the checkpoint again, or use another save."),
    "state-groups-by-rule": Code(
        "warning", "no file states which parameters a group has; Megatron's rules decide"),
    "state-left-out": Code(
        "warning", "a part of the training state is not plain data and is not carried over"),
    "state-masters-rounded": Code(
        "warning", "fp32 masters were rounded to the dtype of the output's weights",
        "Leave out --dtype."),
    "state-named-by-order": Code(
        "warning", "an optimizer's state has no names; the order of the parameters gave them",
        "Compare the first losses of the continued run with those before."),
    "state-steps-differ": Code(
        "info", "parameters have had different numbers of steps, as where some got no gradient"),
    "stray-head": Code(
        "error", "there is a head that the class in the config does not have", by=("doctor",)),
    "tensors-missing": Code(
        "error", "tensors that the architecture has are missing", by=("doctor",)),
    "tied-tensor-copied": Code("warning", "a tensor was read from the tensor that it is tied to"),
    "tokenizer-missing": Code("error", "the tokenizer is missing", by=("doctor",)),
    "tokenizer-too-large": Code(
        "warning", "the tokenizer has more tokens than the embedding", by=("doctor", "try")),
    "tokenizer-too-small": Code(
        "warning", "the embedding has over 1,024 rows more than the tokenizer has tokens",
        by=("try",)),
    "transposed-experts": Code("error", "stacked experts are transposed", by=("doctor",)),
    "unchanged": Code("warning", "every tensor equals the base model's: nothing was trained"),
    "universal-groups": Code(
        "info", "DeepSpeed matches the parameter groups of a universal checkpoint by position",
        "Make the script's parameter groups in that order."),
    "universal-loss-scale": Code(
        "info", "the loss scale of an fp16 run is not carried into a universal checkpoint"),
    "universal-no-schedule": Code(
        "info", "a universal checkpoint was written without the state of a schedule",
        "In a script with a schedule, pass load_lr_scheduler_states=False to load_checkpoint."),
    "universal-stage3": Code(
        "warning", "DeepSpeed's ZeRO stage 3 goes on wrongly from this universal checkpoint",
        "Load it with ZeRO stage 1 or 2, or after loading run the lines of "
        "docs/training-state.md."),
    "universal-unlisted": Code(
        "warning", "a universal checkpoint holds parameters that its model files do not list",
        "Is the folder a copy of two? Make the universal checkpoint again."),
    "universal-unrestored": Code(
        "warning", "DeepSpeed does not restore frozen parameters or buffers of a universal "
        "checkpoint",
        "Start the script from the weights that the run started from."),
    "untrained-layers": Code(
        "info", "loaded models do not hold these layers; they are copied from the base"),
    "vectors-constant": Code(
        "info", "a vector holds one value throughout, as new biases and norms do", by=("try",)),
    "verify-exchanged": Code(
        "warning", "a checkpoint was compared with an output of reshard, as if it were made of it",
        "Name the output first: reshard verify OUT --against SRC."),
    "vocabulary-padded": Code(
        "info", "rows after the base's vocabulary were assumed to be Megatron's padding",
        "If the training added tokens, name a base of that vocabulary."),
    "vocabulary-size": Code("error", "the vocabulary's size is not the config's", by=("doctor",)),
    "weights-all-zero": Code("error", "a matrix is zero throughout", by=("doctor", "try")),
    "weights-constant": Code(
        "error", "a matrix holds one other value throughout", by=("doctor", "try")),
    "weights-large": Code(
        "warning", "a matrix is far larger than those of trained models", by=("doctor",)),
    "weights-missing": Code(
        "error", "a weight is not in the files; transformers filled it with random numbers",
        by=("try",)),
    "weights-not-finite": Code("error", "weights are NaN or infinite", by=("doctor", "try")),
    "weights-not-safetensors": Code(
        "warning", "the weights are in another format and were not checked", by=("try",)),
    "weights-repeated": Code(
        "warning", "two matrices hold the same values: one may be a copy in the other's place",
        "Copy the checkpoint again, or use another save. Experts that were made of one layer are "
        "alike before they are trained.", by=("doctor",)),
    "weights-unexpected": Code(
        "error", "a tensor of the files belongs to no weight of the model", by=("try",)),
    "weights-unread": Code(
        "info", "weight files beside the model were not read", "To convert one, name it."),
    "wrapper-prefix": Code("error", "names carry a wrapper's or trainer's prefix", by=("doctor",)),
    "zero3-placeholders": Code(
        "error", "ZeRO-3 left placeholders where the weights should be", by=("doctor", "try")),
}  # fmt: skip
