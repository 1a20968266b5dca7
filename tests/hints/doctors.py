"""What doctor advises where it cannot mend a folder by itself, or cannot look at it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import reshard
from tests.folders import edit_config, edit_weights
from tests.hints import tiny
from tests.hints.case import Case, follows
from tests.hints.folders import after, converting

Change = Callable[[], Any]
_EXAMINE = (
    "Convert it, then examine the output: reshard convert {} OUT --base HF_DIR; reshard doctor OUT "
    "--base HF_DIR."
)


def looking(folder: Path, base: Path | None = None, repair: Path | None = None) -> Change:
    return lambda: reshard.doctor(folder, base=base, repair=repair)


def is_well(found: Any) -> bool:
    return not {f.code for f in found.errors} - {"tokenizer-missing", "processor-missing"}


def ill(at: Path, change: Callable[[Path], object], **more: Any) -> tuple[Path, Path]:
    """A trained model spoilt, and its base."""
    base, folder = tiny.model(at / "base", **more), tiny.model(at / "ill", 2, **more)
    change(folder)
    return folder, base


def restored(at: Path, change: Callable[[Path], object], **more: Any) -> Case:
    """The fault is gone once the run is converted, or the folder copied, again."""
    folder, _ = ill(at, change, **more)
    whole = tiny.model(at / "whole", 2, **more)
    out = at / "again"
    convert = converting(whole, out, base=whole, allow_unchanged=True)
    return Case(looking(folder), after(convert, looking(out)), same=is_well)


@follows("Copy or download the file again, or convert again.")
def cut_off(at: Path) -> Case:
    return restored(at, lambda folder: os.truncate(folder / "model.safetensors", 3000))


@follows("Copy the file again.")
def pickled_and_cut_off(at: Path) -> Case:
    def change(folder: Path) -> None:
        torch.save(tiny.state(), folder / "pytorch_model.bin")
        os.truncate(folder / "pytorch_model.bin", 3000)
        (folder / "model.safetensors").unlink()

    folder, _ = ill(at, change)
    copied = after(lambda: torch.save(tiny.state(), folder / "pytorch_model.bin"), looking(folder))
    return Case(looking(folder), copied, same=is_well)


@follows("Copy the folder again, with all of its files.")
def lost_shard(at: Path) -> Case:
    reshard.convert(tiny.model(at / "whole"), at / "shards", max_shard_size="20KB")
    shutil.copytree(at / "shards", at / "ill")
    shutil.copy(at / "whole" / "config.json", at / "ill")
    shutil.copytree(at / "ill", at / "copy")
    sorted((at / "ill").glob("model-*.safetensors"))[1].unlink()
    return Case(looking(at / "ill"), looking(at / "copy"), same=is_well)


@follows("Name the base model with --base to take it from there.")
def no_config(at: Path) -> Case:
    folder, base = ill(at, lambda folder: (folder / "config.json").unlink())
    return Case(looking(folder), looking(folder, base, at / "out"), same=lambda f: bool(f.repaired))


@follows("Name the base model with --base to take them from there.")
def no_tokenizer(at: Path) -> Case:
    folder, base = ill(at, lambda folder: None)
    (base / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    return Case(looking(folder), looking(folder, base, at / "out"), same=lambda f: bool(f.repaired))


@follows("Copy the code from where the model came from.")
def no_code(at: Path) -> Case:
    maps = {"AutoModelForCausalLM": "modeling_own.Own"}
    folder, _ = ill(at, lambda folder: None, auto_map=maps)
    copied = after(lambda: (folder / "modeling_own.py").write_text("class Own: ..."),
                   looking(folder))  # fmt: skip
    return Case(looking(folder), copied, same=is_well)


@follows("The run diverged: convert an earlier checkpoint of it.")
def diverged(at: Path) -> Case:
    def change(folder: Path) -> None:
        edit_weights(folder, lambda held: held["model.norm.weight"].fill_(float("nan")))

    return restored(at, change)


@follows("The trained weights are not here: convert the run's checkpoint again.")
def nothing_trained(at: Path) -> Case:
    base, folder = tiny.model(at / "base"), tiny.model(at / "ill", 1)
    run = tiny.zero(at / "run")
    again = after(
        lambda: reshard.convert(run, at / "again", base=base), looking(at / "again", base)
    )
    return Case(looking(folder, base), again, same=is_well)


def _without_head(folder: Path) -> None:
    edit_weights(folder, lambda held: held.pop(tiny.HEAD))


UNTIED: dict[str, Any] = {"tie_word_embeddings": False, "architectures": ["LlamaForCausalLM"]}


@follows("Name the base with --base, to see what it ties.")
def head_lost_alone(at: Path) -> Case:
    folder, base = ill(at, _without_head, **UNTIED)
    told = "The trained head is not here"
    return Case(
        looking(folder), looking(folder, base),
        same=lambda found: any(told in f.fix for f in found.findings),
    )  # fmt: skip


@follows("The trained head is not here: convert the run again.")
def head_lost(at: Path) -> Case:
    folder, base = ill(at, _without_head, **UNTIED)
    run = tiny.zero(at / "run")
    again = after(
        lambda: reshard.convert(run, at / "again", base=base), looking(at / "again", base)
    )
    return Case(looking(folder, base), again, same=is_well)


@follows("One of them is of another model: convert the run again.")
def rows_of_two_models(at: Path) -> Case:
    def change(folder: Path) -> None:
        edit_weights(folder, lambda held: held.update({tiny.HEAD: held[tiny.HEAD][:-4].clone()}))

    return restored(at, change)


@follows("Is it another model's tokenizer, or was a resize not saved?")
def tokenizer_of_another(at: Path) -> Case:
    rows = tiny.state()[tiny.EMBEDDING].shape[0]

    def tokenizer(count: int) -> str:
        vocabulary = {f"t{number}": number for number in range(count)}
        return json.dumps({"model": {"type": "WordLevel", "vocab": vocabulary}})

    folder, _ = ill(at, lambda f: (f / "tokenizer.json").write_text(tokenizer(rows + 9)))
    own = after(lambda: (folder / "tokenizer.json").write_text(tokenizer(rows)), looking(folder))
    return Case(looking(folder), own, same=is_well)


def _placeholders(folder: Path) -> None:
    edit_weights(folder, lambda held: held.update({n: torch.empty(0) for n in held}))


@follows("The values are not here: convert the run's checkpoint, reshard convert RUN OUT.")
def placeholders(at: Path) -> Case:
    return restored(at, _placeholders)


@follows("Two tensors would get one name. Name the base model with --base: its files say what the "
         "names must be.")  # fmt: skip
def wrapped_twice(at: Path) -> Case:
    def change(folder: Path) -> None:
        edit_weights(
            folder, lambda held: held.update({"_orig_mod.model.norm.weight": torch.ones(8)})
        )

    folder, base = ill(at, change)
    return Case(looking(folder), looking(folder, base), same=lambda found: bool(found.errors))


@follows("Did the training start from --base?")
def another_base(at: Path) -> Case:
    folder = tiny.model(at / "ill", 2)
    other = tiny.model(at / "other", name="qwen2")
    return Case(looking(folder, other), looking(folder, tiny.model(at / "base")), same=is_well)


@follows(
    "If they were frozen and left out: reshard convert DIR OUT --base HF_DIR --fill-from-base."
)
def frozen_left_out(at: Path) -> Case:
    def change(folder: Path) -> None:
        edit_weights(folder, lambda held: held.pop("model.norm.weight"))

    folder, base = ill(at, change)
    out = at / "out"
    filled = after(converting(folder, out, base=base, fill_from_base=True), looking(out, base))
    return Case(looking(folder, base), filled, same=is_well)


@follows("Such a folder loads in the transformers version that has these names, and fails or "
         "starts with random weights elsewhere. Name the base model with --base: its files say "
         "what the names must be.")  # fmt: skip
def names_in_memory(at: Path) -> Case:
    from tests.naming import tables

    shapes = tables.table("4.57", "qwen2_5_vl").memory
    held = {k: torch.from_numpy(v) for k, v in tables.random_arrays(shapes, 2).items()}
    folder = tiny.model(at / "ill", name="qwen2_5_vl", tensors=held)
    base = tiny.model(at / "base", name="qwen2_5_vl")
    return Case(looking(folder), looking(folder, base, at / "out"), same=lambda f: bool(f.repaired))


@follows(_EXAMINE)
def a_training_checkpoint(at: Path) -> Case:
    run, base = tiny.zero(at / "run"), tiny.model(at / "base")
    converted = after(converting(run, at / "out", base=base), looking(at / "out", base))
    return Case(looking(run), converted, same=is_well)


@follows(_EXAMINE)
def an_adapter(at: Path) -> Case:
    folder, base = tiny.adapter(at / "adapter"), tiny.model(at / "base")
    merged = after(
        converting(folder, at / "out", base=base, lora="merge", fill_from_base=True),
        looking(at / "out", base),
    )
    return Case(looking(folder), merged, same=is_well)


@follows(_EXAMINE)
def shards_of_ranks(at: Path) -> Case:
    folder, base = at / "ranks", tiny.model(at / "base")
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    state = tiny.state()
    writer = HuggingFaceStorageWriter(
        path=str(folder), fqn_to_index_mapping=dict.fromkeys(state, 1), save_distributed=True
    )
    dcp.save(state, storage_writer=writer, no_dist=True)
    converted = after(converting(folder, at / "out", base=base), looking(at / "out", base))
    return Case(looking(folder), converted, same=is_well)


@follows("Examine the output of convert --srm-format split.")
def of_lightrft(at: Path) -> Case:
    from tests.hints.parts import _reward

    run, base = _reward(at)
    common: dict[str, Any] = {"base": base, "model_type": "srm_vl"}
    reshard.convert(run, at / "own", srm_format="lightrft", **common)
    split = after(converting(run, at / "out", srm_format="split", **common), looking(at / "out"))
    return Case(looking(at / "own"), split, same=is_well)


@follows("Convert the run's checkpoint again: reshard convert RUN OUT --base HF_DIR.")
def mended_without_its_head(at: Path) -> Case:
    folder, base = ill(at, lambda f: (f / "config.json").unlink())
    save_file({"v_head.weight": torch.ones(1, 8)}, folder / "value_head.safetensors")
    run = tiny.zero(at / "run")
    again = after(converting(run, at / "again", base=base), looking(at / "again", base))
    return Case(looking(folder, base, at / "out"), again, same=is_well)


@follows("If it was frozen and not saved: reshard convert RUN OUT --base HF_DIR --fill-from-base.")
def without_its_tower(at: Path) -> Case:
    kind: dict[str, Any] = {
        "name": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"]
    }  # fmt: skip
    base = tiny.model(at / "base", **kind)
    held = load_file(tiny.model(at / "ill", 2, **kind) / "model.safetensors")
    kept = {name: value for name, value in held.items() if not name.startswith("visual.")}
    save_file(kept, at / "ill" / "model.safetensors", {"format": "pt"})
    out = at / "out"
    filled = after(converting(at / "ill", out, base=base, fill_from_base=True), looking(out))
    return Case(looking(at / "ill"), filled, same=is_well)


@follows("config.json may be another model's. Convert the run's checkpoint again: reshard "
         "convert RUN OUT --base HF_DIR.")  # fmt: skip
def of_another_size(at: Path) -> Case:
    folder, base = ill(at, lambda f: edit_config(f, hidden_size=99))
    again = after(converting(tiny.zero(at / "run"), at / "again", base=base),
                  looking(at / "again", base))  # fmt: skip
    return Case(looking(folder), again, same=is_well)
