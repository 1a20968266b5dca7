"""Sound checkpoints, and every name in them that a command asks for."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests.hostile.bench import Bench

GOLDEN = Path(__file__).parents[1] / "golden"


@dataclass(frozen=True)
class Place:
    """A checkpoint `source` and what else commands are given, all below `root`."""

    root: Path
    source: Path
    base: Path | None = None

    def commands(self) -> Iterator[tuple[str, ...]]:
        """All commands that read a checkpoint, a model or an output."""
        source, out, base = str(self.source), str(self.root / "out"), str(self.base or "")
        onto = ("--base", base) if self.base else ()
        yield ("inspect", source, *onto, "--optimizer")
        yield ("inspect", source, "--json")
        yield ("convert", source, str(self.root / "new"), *onto, "--quiet")
        yield ("convert", source, str(self.root / "new"), "--to", "dcp", "--optimizer", *onto)
        yield ("diff", source, source, *onto, "--optimizer")
        yield ("doctor", source, *onto)
        if (self.root / "out").is_dir():
            yield ("verify", out)
            yield ("verify", out, "--against", source, *onto)
            yield ("doctor", out, *onto)
            yield ("diff", out, source)


def golden(name: str) -> Callable[[Path], Place]:
    """One of `tests/golden`."""

    def make(root: Path) -> Place:
        shutil.copytree(GOLDEN / name / "checkpoint", root / "run")
        return Place(root, root / "run")

    return make


def unpacked(name: str) -> Callable[[Path], Place]:
    """A training state of `tests/golden/state`."""

    def make(root: Path) -> Place:
        with tarfile.open(GOLDEN / "state" / f"{name}.tar.xz") as packed:
            packed.extractall(root / "run", filter="data")
        return Place(root, root / "run")

    return make


def onto(name: str, described: Mapping[str, tuple[str, Sequence[int]]], root: Path) -> Place:
    """A golden checkpoint with a base of zeros."""
    shutil.copytree(GOLDEN / name / "checkpoint", root / "run")
    base = root / "base"
    base.mkdir()
    return Place(root, root / "run", base)


def model(root: Path) -> Place:
    """A Hugging Face model with all that lies beside one, and an adapter of it."""
    base = root / "base"
    base.mkdir()
    tensors = {
        f"model.layers.{layer}.{part}.weight": np.ones((8, 8), np.float32)
        for layer in range(2)
        for part in ("self_attn.q_proj", "mlp.up_proj")
    }
    tensors["model.embed_tokens.weight"] = np.ones((16, 8), np.float32)
    tensors["lm_head.weight"] = np.ones((16, 8), np.float32)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8,
              "vocab_size": 16, "num_hidden_layers": 2, "tie_word_embeddings": False}  # fmt: skip
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    vocabulary = {"model": {"type": "BPE", "vocab": {str(n): n for n in range(16)}, "merges": []}}
    (base / "tokenizer.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    for name in ("tokenizer_config", "generation_config", "special_tokens_map"):
        (base / f"{name}.json").write_text("{}", encoding="utf-8")
    trained = root / "run"
    trained.mkdir()
    save_file({n: 2 * t for n, t in tensors.items()}, trained / "model.safetensors")
    shutil.copy(base / "config.json", trained)
    return Place(root, trained, base)


def adapter(root: Path) -> Place:
    """A PEFT adapter of that model."""
    place = model(root)
    shutil.rmtree(place.source)
    place.source.mkdir()
    tensors = {
        f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{half}.weight": np.ones(
            (2, 8) if half == "A" else (8, 2), np.float32
        )
        for layer in range(2)
        for half in "AB"
    }
    save_file(tensors, place.source / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"],
              "base_model_name_or_path": str(place.base)}  # fmt: skip
    (place.source / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return place


def sharded(root: Path) -> Place:
    """Two shards and an index."""
    place = model(root)
    held = {}
    for number in (1, 2):
        name = f"model-0000{number}-of-00002.safetensors"
        save_file({f"w{number}": np.ones(4, np.float32)}, place.source / name)
        held[f"w{number}"] = name
    (place.source / "model.safetensors").unlink()
    stated = {"metadata": {"total_size": 32}, "weight_map": held}
    index = place.source / "model.safetensors.index.json"
    index.write_text(json.dumps(stated), encoding="utf-8")
    return Place(root, place.source)


def pickled(root: Path) -> Place:
    """A state dict of torch.save."""
    from tests.torchfile.handmade import tensor, text, torch_file

    (root / "run").mkdir()
    body = b"}" + text("w") + tensor() + b"s"
    (root / "run" / "pytorch_model.bin").write_bytes(torch_file(body))
    return Place(root, root / "run")


def cached(root: Path) -> Place:
    """A model in the cache of the hub."""
    from safetensors.numpy import save

    repository = root / "models--a--b"
    for folder in ("blobs", "refs", "snapshots/0123"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs/main").write_text("0123")
    (repository / "blobs/77").write_bytes(save({"w": np.ones(4, np.float32)}))
    (repository / "snapshots/0123/model.safetensors").symlink_to("../../blobs/77")
    return Place(root, repository)


PLACES: Mapping[str, Callable[[Path], Place]] = {
    "model": model,
    "adapter": adapter,
    "sharded": sharded,
    "pickled": pickled,
    "cached": cached,
    "dcp": golden("dcp"),
    "zero2": golden("zero2"),
    "zero3": golden("zero3"),
    "legacy": golden("legacy"),
    "megatron": golden("megatron/mcore012_llama_dp2_distopt_modelspace_bf16"),
    "bridge": golden("megatron/bridge_llama_tp2_bf16"),
    "nemo": golden("megatron/nemo2_qwen2_tp2_bf16"),
    "verl megatron": golden("megatron/verl_megatron_v2_qwen2_pp2_bf16"),
    "verl": golden("ranks/lora"),
    "verl lora only": golden("ranks/lora-only"),
    "verl state": unpacked("fsdp2_verl_fp32"),
    "local": golden("ranks/local-slices"),
    "state zero1": unpacked("ds_s1_bf16"),
    "state zero3": unpacked("ds_s3_fp32_subgroups"),
    "state zero0": unpacked("ds_s0_fp32"),
    "universal": unpacked("uc_s2_fp32"),
    "accelerate": unpacked("fsdp2_accelerate_bf16"),
    "accelerate fsdp1": unpacked("fsdp1_accelerate_fp32"),
    "lightrft": unpacked("fsdp2_lightrft_fp32"),
    "titan": unpacked("fsdp2_titan_fp32"),
    "nested": unpacked("fsdp2_nested_fp32"),
}


def made(name: str, root: Path, bench: Bench) -> Place:
    """The place, with an output in it where the checkpoint can be converted alone."""
    place = PLACES[name](root)
    onto = ("--base", str(place.base)) if place.base else ()
    fills = ("--fill-from-base",) if name == "adapter" else ()
    bench.run("convert", place.source, root / "out", *onto, *fills, "--quiet")
    return place


def asked(place: Place, bench: Bench) -> dict[str, list[tuple[str, ...]]]:
    """The names below the root that commands ask for, each with the commands that do."""
    found: dict[str, list[tuple[str, ...]]] = {}
    for command in place.commands():
        before = {path.name for path in place.root.iterdir()}
        for path in bench.run(*command, recording=True).asked:
            if path.startswith(f"{place.root}/"):
                name = path[len(str(place.root)) + 1 :]
                if "/" in name and not name.startswith((".", "new")):
                    found.setdefault(name, []).append(command)
        for made_now in list(place.root.iterdir()):
            if made_now.name not in before:
                shutil.rmtree(made_now)
    return found
