"""Huge and odd inputs: each is made in a folder, with the command that is given it."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

Command = tuple[str | Path, ...]
Maker = Callable[[Path], Command]
INPUTS: dict[str, Maker] = {}


def register(make: Maker) -> Maker:
    INPUTS[make.__name__.replace("_", " ")] = make
    return make


# Names and folders.


def _files(folder: Path, names: Iterator[str]) -> None:
    """Empty files, which are links to one: that takes a third of the time."""
    folder.mkdir(exist_ok=True)
    first = folder / "first"
    first.touch()
    for name in names:
        os.link(first, folder / name)


for _kind, _name in {
    "files": "x{}",
    "rank files": "model_world_size_60000_rank_{}.pt",
    "files of deepspeed": "zero_pp_rank_{}_mp_rank_00_model_states.pt",
    "model parallel ranks": "mp_rank_{:02d}_model_states.pt",
    "shards": "model-{:05d}-of-60000.safetensors",
}.items():

    def _very_many(at: Path, name: str = _name) -> Command:
        _files(at / "run", map(name.format, range(60_000)))
        return "inspect", at / "run"

    INPUTS[f"very many {_kind}"] = _very_many


@register
def very_many_folders(at: Path) -> Command:
    for number in range(20_000):
        (at / "run" / f"step{number}").mkdir(parents=True)
    return "inspect", at / "run"


@register
def very_many_saves_and_none_of_the_tag(at: Path) -> Command:
    for number in range(5_000):
        place = at / "run" / f"global_step{number}"
        place.mkdir(parents=True)
        (place / "mp_rank_00_model_states.pt").touch()
    return "inspect", at / "run", "--tag", "global_stap77"


def _deep(at: Path, levels: int, file: str = "") -> None:
    """Folders in folders, and a file in the innermost: all in all longer than a path may be."""
    here = Path.cwd()
    try:
        os.chdir(at)
        for _ in range(levels):
            Path("d").mkdir()
            os.chdir("d")
        if file:
            Path(file).touch()
    finally:
        os.chdir(here)


@register
def folders_in_folders(at: Path) -> Command:
    _deep(at, 2000)
    return "inspect", at / "d"


@register
def a_deep_base(at: Path) -> Command:
    """Its files are copied, with those in folders below it."""
    command = _model(at)
    _deep(at / "base", 1500, "merges.txt")
    return command


@register
def a_wide_base(at: Path) -> Command:
    command = _model(at)
    _files(at / "base", (f"x{n}.txt" for n in range(50_000)))
    return *command, "--dry-run"


# JSON beside weights.


def _safetensors(path: Path, header: Mapping[str, Any], nbytes: int) -> None:
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(nbytes))


def _named(names: list[str], folder: Path) -> None:
    """Weights of one number each under these names."""
    folder.mkdir(exist_ok=True)
    header = {
        name: {"dtype": "F32", "shape": [1], "data_offsets": [4 * n, 4 * n + 4]}
        for n, name in enumerate(names)
    }
    _safetensors(folder / "model.safetensors", header, 4 * len(names))


def _model(at: Path, **config: object) -> Command:
    names = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"]
    for folder in ("run", "base"):
        _named(names, at / folder)
    stated = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **config}
    (at / "base" / "config.json").write_text(json.dumps(stated))
    return "convert", at / "run", at / "out", "--base", at / "base"


def _onto(at: Path, names: list[str]) -> Command:
    command = _model(at)
    _named(names, at / "run")
    return command


for _part in ("0.", "layers.0.", "a.", "experts.", "model.layers.1.mlp.experts.", "module.", "..",
              "default.", "mlp.experts.experts.0.linear_fc1.", "base_model.model."):  # fmt: skip

    def _long_names(at: Path, part: str = _part) -> Command:
        return _onto(at, [part * (30_000 // len(part)) + f"weight{n}" for n in range(100)])

    INPUTS[f"long names of {_part}"] = _long_names


@register
def a_name_of_four_megabytes(at: Path) -> Command:
    return _onto(at, ["a.0." * 1_000_000 + "weight"])


@register
def names_that_all_differ(at: Path) -> Command:
    return _onto(at, [f"decoder.block.{n}.weights.{n * n}" for n in range(40_000)])


@register
def config_with_many_architectures(at: Path) -> Command:
    return _model(at, architectures=["a" * 1000 + str(n) for n in range(10_000)])


@register
def config_with_a_long_type(at: Path) -> Command:
    return _model(at, model_type="x" * 10_000_000)


@register
def config_with_a_billion_layers(at: Path) -> Command:
    return _model(at, num_hidden_layers=10**9, num_local_experts=10**9, vocab_size=10**18)


@register
def a_billion_experts(at: Path) -> Command:
    _model(at, model_type="mixtral", architectures=["MixtralForCausalLM"],
                     num_local_experts=10**9)  # fmt: skip
    stem = "model.layers.0.block_sparse_moe.experts"
    _named(
        [f"{stem}.0.w1.weight", f"{stem}.99999999999.w1.weight", "model.layers.\u00b2.x"],
        at / "base",
    )
    return "doctor", at / "base"


@register
def a_billion_experts_without_elements(at: Path) -> Command:
    """Stacked in torchtitan's names: as many tensors on the hub."""
    command = _model(at, model_type="qwen3_moe", num_hidden_layers=1)
    shapes = {
        "tok_embeddings.weight": [1],
        "layers.0.attention.wo.weight": [1],
        "layers.0.moe.experts.w1": [10**9, 0, 4],
    }
    header = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + (4 if shape == [1] else 0)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    _safetensors(at / "run" / "model.safetensors", header, end)
    return command


@register
def config_with_many_parts(at: Path) -> Command:
    parts = {f"x{n}_config": {"model_type": "llama", "vocab_size": n} for n in range(50_000)}
    return _model(at, **parts)


@register
def an_index_of_many_files(at: Path) -> Command:
    (at / "run").mkdir()
    stated = {"weight_map": {f"w{n}": f"f{n}.safetensors" for n in range(150_000)}}
    (at / "run" / "model.safetensors.index.json").write_text(json.dumps(stated))
    return "inspect", at / "run"


def _adapter(at: Path, **settings: object) -> Command:
    _model(at)
    (at / "run" / "model.safetensors").unlink()
    stem = "base_model.model.model.layers.0.mlp.up_proj"
    _named([f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"], at / "run")
    (at / "run" / "model.safetensors").rename(at / "run" / "adapter_model.safetensors")
    stated = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["up_proj"]}
    (at / "run" / "adapter_config.json").write_text(json.dumps({**stated, **settings}))
    return "convert", at / "run", at / "out", "--base", at / "base", "--fill-from-base"


@register
def an_adapter_with_many_modules(at: Path) -> Command:
    return _adapter(at, target_modules=[f"m{n}" for n in range(200_000)])


@register
def an_adapter_with_a_slow_pattern(at: Path) -> Command:
    return _adapter(at, target_modules="(a*)*(a*)*(a*)*b" * 50, rank_pattern={"(a+)+$": 2})


@register
def an_adapter_with_many_patterns(at: Path) -> Command:
    return _adapter(at, rank_pattern={f"x{n}.*y.*": 2 for n in range(9_999)})


@register
def an_adapter_with_a_long_base(at: Path) -> Command:
    return _adapter(at, base_model_name_or_path="a/" * 2_000_000)


@register
def a_hub_cache_of_many_snapshots(at: Path) -> Command:
    for name in ("blobs", "refs"):
        (at / "run" / name).mkdir(parents=True)
    for number in range(20_000):
        (at / "run" / "snapshots" / f"{number:040x}").mkdir(parents=True)
    (at / "run/refs/main").write_bytes(b"\xff" * 4000)
    return "inspect", at / "run"
