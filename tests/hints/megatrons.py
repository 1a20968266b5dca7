"""Hints about checkpoints of Megatron-Core: what megatron-core wrote, spoilt and whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed import checkpoint as dcp

import reshard
from tests.folders import edit_weights
from tests.hints import tiny
from tests.hints.case import Case, follows
from tests.hints.folders import after, converting, moved
from tests.megatron.golden import base, checkpoint, copied, digested, saved, truth, weights

NAME = "bridge_llama_tp2_bf16"
PADDED = "mlm_llama_dp2_distopt_dp_bf16"
LATENT = "mlm_deepseekv3_mtp_fp32"
LAYER = "decoder.layers.0.mlp.linear_fc1"


def held(name: str = NAME) -> Callable[[Any], bool]:
    """Whether a conversion gives what Megatron's model held, by the hub's names."""

    def same(report: Any) -> bool:
        again = Path(report.target).with_name("proof")
        reshard.convert(
            report.checkpoint, again, base=base(name, again.with_name("own")), dtype="keep"
        )
        return digested(again) == truth(name)

    return same


def spoilt(at: Path, spoil: Callable[[Path], object]) -> Case:
    """A run that is spoilt, and another save of it: an earlier one, or a copy of the whole."""
    run = copied(NAME, at / "run")
    spoil(weights(run))
    return moved(run, checkpoint(NAME), at, same=held())


def restored(at: Path, file: str) -> Case:
    """A file that was left behind when the folder was copied."""
    run = copied(NAME, at / "run")
    lost = weights(run) / file
    lost.rename(at / "lost")
    back = after(lambda: shutil.copy(at / "lost", lost), converting(run, at / "two"))
    return Case(converting(run, at / "one"), back, same=held())


@follows("Copy the folder again (the file's name begins with a dot), or use an earlier checkpoint.")
def no_metadata(at: Path) -> Case:
    return restored(at, ".metadata")


@follows("Copy the folder again (the file's name begins with a dot), or use an earlier checkpoint.")
def no_metadata_and_an_earlier_one(at: Path) -> Case:
    return spoilt(at, lambda folder: (folder / ".metadata").unlink())


@follows("Use an earlier checkpoint, or copy the folder again if the file was left behind.")
def unfinished(at: Path) -> Case:
    return restored(at, "metadata.json")


@follows("Use an earlier checkpoint, or copy the folder again if the file was left behind.")
def unfinished_and_an_earlier_one(at: Path) -> Case:
    return spoilt(at, lambda folder: (folder / "metadata.json").unlink())


@follows("Load it with the Megatron that wrote it, and save it with --ckpt-format torch_dist.")
def another_backend(at: Path) -> Case:
    stated = json.dumps({"sharded_backend": "zarr", "sharded_backend_version": 1})
    return spoilt(at, lambda folder: (folder / "metadata.json").write_text(stated))


@follows("Convert the checkpoint from before that, or export it with ModelOpt.")
def changed_by_modelopt(at: Path) -> Case:
    return spoilt(at, lambda folder: (folder / "modelopt_state").mkdir())


@follows("Convert it to torch_dist with Megatron-LM (--ckpt-convert-format torch_dist).")
def one_file_a_rank(at: Path) -> Case:
    folder = at / "run" / "iter_0000010" / "mp_rank_00"
    folder.mkdir(parents=True)
    torch.save({"model": {"w": torch.ones(2)}}, folder / "model_optim_rng.pt")
    return moved(at / "run", checkpoint(NAME), at, same=held())


def of_kind(name: str, tensor: torch.Tensor) -> Callable[[Path], Case]:
    def make(at: Path) -> Case:
        return moved(saved(at / "iter_0000001", {name: tensor}), checkpoint(NAME), at, same=held())

    return make


for _hint, _name, _tensor in (
    ("Merge them with the trainer that wrote them, and convert the merged checkpoint.",
     f"{LAYER}.adapter.linear_in.weight", torch.ones(2, 2)),
    ("Convert the checkpoint from before that, or export it with ModelOpt.",
     f"{LAYER}.weight_quantizer._amax", torch.ones(1)),
    ("Export it with Megatron-Bridge, or with the trainer's own conversion.",
     "decoder.layers.0.mixer.in_proj.weight", torch.ones(2, 2)),
):  # fmt: skip
    follows(_hint)(of_kind(_name, _tensor))


@follows("Save them in bfloat16 (without --fp8-param-gather).")
def weights_in_fp8(at: Path) -> Case:
    state = {f"{LAYER}.weight": torch.ones(2, 2)}
    eight = {name: value.to(torch.float8_e4m3fn) for name, value in state.items()}
    sixteen = {name: value.bfloat16() for name, value in state.items()}
    return moved(saved(at / "a" / "iter_1", eight), saved(at / "b" / "iter_1", sixteen), at)


@follows("Export it with Megatron-Bridge, or with the trainer's own conversion.")
def family_that_is_not_known(at: Path) -> Case:
    """What the trainer exports is a Hugging Face model."""
    model = base(NAME, at / "base", model_type="phi3")
    exported = shutil.copytree(model, at / "exported")
    edit_weights(exported, lambda tensors: [value.fill_(0.5) for value in tensors.values()])
    return Case(
        converting(copied(NAME, at / "run"), at / "one", base=model),
        converting(exported, at / "two", base=model),
    )


def _onto(name: str, at: Path, wrong: Path, right: Path) -> Case:
    return Case(
        converting(checkpoint(name), at / "one", base=wrong),
        converting(checkpoint(name), at / "two", base=right, dtype="keep"),
        same=lambda report: digested(at / "two") == truth(name),
    )


@follows("Name the base as it was released.")
def base_of_other_rows(at: Path) -> Case:
    wrong = base(LATENT, at / "wrong", rope_interleave=False)
    return _onto(LATENT, at, wrong, base(LATENT, at / "right"))


@follows("Check that --base is the model that the training started from.")
def settings_of_another_model(at: Path) -> Case:
    wrong = base(NAME, at / "wrong", num_key_value_heads=4)
    return _onto(NAME, at, wrong, base(NAME, at / "right"))


def _grown(model: Path, rows: int) -> Path:
    """A base of another vocabulary."""

    def grow(tensors: tiny.State) -> None:
        for name in (tiny.EMBEDDING, tiny.HEAD):
            if name in tensors:
                kept = tensors[name][:rows]
                more = torch.zeros(rows - len(kept), kept.shape[1], dtype=kept.dtype)
                tensors[name] = torch.cat([kept, more])

    edit_weights(model, grow)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))
    return model


@follows("Name the base whose vocabulary the training had.")
def base_of_a_larger_vocabulary(at: Path) -> Case:
    wrong = _grown(base(NAME, at / "wrong"), 4096)
    return _onto(NAME, at, wrong, base(NAME, at / "right"))


@follows("If the training added tokens, name a base with that vocabulary.")
def padding_that_was_trained(at: Path) -> Case:
    rows = reshard.open(checkpoint(PADDED)).tensors["embedding.word_embeddings.weight"].shape[0]
    grown = _grown(base(PADDED, at / "grown"), rows)
    return Case(
        converting(checkpoint(PADDED), at / "one", base=base(PADDED, at / "base")),
        converting(checkpoint(PADDED), at / "two", base=grown),
        same=lambda report: reshard.open(at / "two").tensors[tiny.EMBEDDING].shape[0] == rows,
    )


@follows("Save with --ckpt-format torch_dist, and convert that.")
def megatron_fsdp(at: Path) -> Case:
    native = at / "native"
    reshard.convert(checkpoint(NAME), native)
    state = {n: torch.from_numpy(t.numpy().astype("float32"))
             for n, t in reshard.open(native).tensors.items()}  # fmt: skip
    dcp.save({"model": {"module": state}}, checkpoint_id=at / "dcp", no_dist=True)
    model = base(NAME, at / "base")
    return Case(
        converting(at / "dcp", at / "one", base=model),
        converting(checkpoint(NAME), at / "two", base=model, dtype="keep"),
        same=lambda report: digested(at / "two") == truth(NAME),
    )


@follows("Name the one to read.")
def two_models_in_a_folder(at: Path) -> Case:
    run = at / "run"
    for below in ("weights", "dist_ckpt"):
        shutil.copytree(weights(checkpoint(NAME)), run / below)
    return moved(run, run / "weights", at, same=held())


def _optimizer_alone(folder: Path) -> Path:
    return saved(folder, {"optimizer.state.exp_avg.decoder.final_layernorm.weight": torch.ones(2)})


@follows("The model lies in {}{}: name that folder.")
def model_beside_its_optimizer(at: Path) -> Case:
    actor = at / "global_step_5" / "actor"
    _optimizer_alone(actor / "optimizer" / "dist_ckpt")
    exported = tiny.model(actor / "model" / "huggingface")
    return moved(actor / "optimizer" / "dist_ckpt", exported, at)


@follows("The run saved the state of its optimizer and no model.")
def optimizer_alone(at: Path) -> Case:
    actor = at / "global_step_5" / "actor"
    _optimizer_alone(actor / "optimizer" / "dist_ckpt")
    return moved(actor.parent, checkpoint(NAME), at, same=held())


@follows("The model's checkpoint lies beside it, or was not saved.")
def optimizer_of_a_folder_of_its_own(at: Path) -> Case:
    shutil.copytree(weights(checkpoint(NAME)), at / "runs" / "model")
    optimizer = _optimizer_alone(at / "runs" / "optim")
    return moved(optimizer, at / "runs" / "model", at, same=held())


@follows("Name another output, or move them out of the folder.")
def output_of_a_run(at: Path) -> Case:
    """An output onto which the trainer then saved."""
    out = at / "out"
    reshard.convert(checkpoint(NAME), out)
    save_file({"w": torch.ones(1)}, out / "other.safetensors")
    run = converting(checkpoint(NAME), out, overwrite=True)
    return Case(run, after(lambda: (out / "other.safetensors").rename(at / "w"), run), same=held())
