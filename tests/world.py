"""The checkpoints and models that the documentation's commands name: small, of the real frameworks.

A page says `results/my-run/_actor`, `checkpoints/Qwen2.5-7B`, `RUN` or `out`; `World.put` puts a
small one of the same kind there, made by DeepSpeed, PEFT, Megatron-Core or verl, or converted from
those.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.distributed import checkpoint

import reshard
from tests import folders
from tests.evaluate import tiny
from tests.megatron import golden as megatron
from tests.naming.lightrft_models import ScalarRewardModel
from tests.oracle.cache import Oracle
from tests.quantised import makers

_RANKS = Path(__file__).parent / "golden" / "ranks"
_MEGATRON = "mlm_qwen3_tied_pp2_te_bf16"


class World:
    """Makes each thing once, below `kept`, and copies it to where a page has it."""

    def __init__(self, oracle: Oracle, kept: Path) -> None:
        self._oracle, self._kept = oracle, kept

    def put(self, kind: str, place: Path) -> None:
        """Have what is called `kind` at `place`, a path that does not exist."""
        made = self._made(kind)
        place.parent.mkdir(parents=True, exist_ok=True)
        if made.is_dir():
            shutil.copytree(made, place)
        else:
            shutil.copy(made, place)

    def _made(self, kind: str) -> Path:
        place = self._kept / kind
        if not place.exists():
            MAKERS[kind](self, place)
        return place

    def run(self, place: Path) -> None:
        """A DeepSpeed run, whose base is `base`."""
        shutil.copytree(self._oracle["llama-zero2"].root, place)

    def step(self, place: Path) -> None:
        """One save of it."""
        shutil.copytree(self._oracle["llama-zero2"].last.path, place)

    def base(self, place: Path) -> None:
        shutil.copytree(self._oracle["llama-zero2"].base, place)

    def elastic(self, place: Path) -> None:
        """A DeepSpeed run whose files hold no hyperparameters."""
        shutil.copytree(self._oracle["elastic-zero2"].root, place)

    def groups(self, place: Path) -> None:
        """What a user writes for it, from the error that asks for it."""
        group = {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01}
        place.write_text(json.dumps([group, {**group, "weight_decay": 0.0}]), encoding="utf-8")

    def out(self, place: Path) -> None:
        """The run, converted."""
        reshard.convert(self._made("run"), place, base=self._made("base"))

    def saves(self, place: Path) -> None:
        """A run of three saves, as Hugging Face folders."""
        for step in range(3):
            changed(self._made("base"), place / f"checkpoint-{step + 1}", step + 1)

    def dcp(self, place: Path) -> None:
        """The Hugging Face Trainer's folder of an FSDP run."""
        reshard.convert(self._made("out"), place / "pytorch_model_fsdp_0", to="dcp")

    def titan(self, place: Path) -> None:
        reshard.convert(self._made("out"), place, to="dcp", names="torchtitan")

    def moved(self, place: Path) -> None:
        reshard.convert(self._made("run"), place, to="dcp", optimizer=True)

    def first(self, place: Path) -> None:
        """An earlier save of a run that made two."""
        shutil.copytree(self._oracle["two-tags"].saves[0].path, place)

    def second(self, place: Path) -> None:
        shutil.copytree(self._oracle["two-tags"].saves[1].path, place)

    def lora(self, place: Path) -> None:
        shutil.copytree(self._oracle["lora-zero2"].root, place)

    def adapter(self, place: Path) -> None:
        """PEFT's folder of adapters of `base`."""
        self._adapted().save_pretrained(place)

    def adapters(self, place: Path) -> None:
        """The state dict of a model with adapters, without their config."""
        torch.save(self._adapted().state_dict(), place)

    def _adapted(self) -> torch.nn.Module:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self._made("base"), dtype="auto")
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=False)
        return get_peft_model(model, config)

    def critic(self, place: Path) -> None:
        """A state dict with a value head, without some of the model's tensors."""
        state = trained(self._made("base"))
        del state["lm_head.weight"], state["model.layers.0.self_attn.k_proj.weight"]
        width = state["model.norm.weight"].shape[0]
        torch.save({**state, "value_head.weight": torch.ones(1, width).bfloat16()}, place)

    def srm(self, place: Path) -> None:
        """LightRFT's scalar reward model, saved by DCP: its backbone and two heads."""
        from transformers import AutoModel

        backbone = AutoModel.from_pretrained(self._made("base"), dtype="auto")
        width = backbone.config.hidden_size
        heads = {"types": ("preference", "alignment"), "pooling": "attn", "scaled": False}
        model = ScalarRewardModel(backbone, -1, width, **heads).bfloat16()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.125
        checkpoint.save(model.state_dict(), checkpoint_id=place, no_dist=True)

    def fp8(self, place: Path) -> None:
        makers.blocks(place, makers.llama())

    def trained_on_fp8(self, place: Path) -> None:
        """What was trained from an fp8 release: its bfloat16 numbers, changed."""
        reshard.convert(self._made("fp8"), place, dtype="bfloat16")
        shift(place)

    def qlora(self, place: Path) -> None:
        """A PEFT checkpoint over codes: what is frozen is not there."""
        place.mkdir()
        state = {n: v for n, v in self._adapted().state_dict().items() if "lora_" in n}
        save_file(state, place / "model.safetensors")
        self._adapted().peft_config["default"].save_pretrained(place)

    def megatron(self, place: Path) -> None:
        shutil.copytree(megatron.checkpoint(_MEGATRON), place)

    def megatron_base(self, place: Path) -> None:
        megatron.base(_MEGATRON, place)

    def verl(self, place: Path) -> None:
        shutil.copytree(_RANKS / "tied" / "checkpoint", place)

    def verl_base(self, place: Path) -> None:
        """A base of other values for it."""
        reshard.convert(self._made("verl"), place)
        shutil.copy(_RANKS / "tied" / "base" / "config.json", place)
        shift(place)

    def chat(self, place: Path) -> None:
        """A model that answers."""
        tiny.causal(place)

    def chat_wide(self, place: Path) -> None:
        """The same in float32 and in other values."""
        changed(self._made("chat"), place)

    def llava_base(self, place: Path) -> None:
        tiny.llava(place)

    def llava(self, place: Path) -> None:
        """An export as doctor's page describes it: the names of the live module, in a wrapper."""
        from transformers import LlavaForConditionalGeneration

        base = self._made("llava_base")
        place.mkdir()
        shutil.copy(base / "config.json", place)
        state = LlavaForConditionalGeneration.from_pretrained(base).state_dict()
        save_file(
            {f"module.{name}": value.clone() for name, value in state.items()},
            place / "model.safetensors",
        )

    def mixtral(self, place: Path) -> None:
        """A model whose live module stacks its experts."""
        from transformers import MixtralConfig, MixtralForCausalLM

        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
        MixtralForCausalLM(MixtralConfig(vocab_size=37, **sizes, **heads)).save_pretrained(place)

    def script(self, place: Path) -> None:
        place.write_text("import sys\nassert sys.argv[1]\n", encoding="utf-8")


def trained(base: Path) -> dict[str, torch.Tensor]:
    """The base's tensors, a little changed."""
    state: dict[str, torch.Tensor] = load_file(base / "model.safetensors")
    return {name: value + 0.125 if value.is_floating_point() else value
            for name, value in state.items()}  # fmt: skip


def shift(folder: Path) -> None:
    folders.edit_weights(folder, lambda state: state.update(trained(folder)))


def changed(base: Path, folder: Path, times: int = 1) -> Path:
    """A copy of a model with other values."""
    shutil.copytree(base, folder)
    for _ in range(times):
        shift(folder)
    return folder


MAKERS: Mapping[str, Callable[[World, Path], None]] = {
    name: maker
    for name, maker in vars(World).items()
    if callable(maker) and not name.startswith("_") and name != "put"
}
