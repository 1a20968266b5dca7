"""Models of the hub in Meta's own files: what they compute there, and back again.

`Meta` is the forward pass of Meta's published `Transformer` (llama3/llama/model.py, and
`apply_scaling` of llama-models): complex rotary embeddings of neighbouring rows, a feed-forward
whose width comes from `ffn_dim_multiplier` and `multiple_of`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import reshard
from reshard.naming import meta
from tests.folders import edit_config, edit_weights
from tests.megatron.golden import digested
from tests.megatron.models import model

TOKENS = torch.arange(24).reshape(2, 12) * 37 % 61
_SCALED = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 8192}  # fmt: skip
#: What configs of the generations state, and what `params.json` must.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "1": ({"num_key_value_heads": 4}, {"multiple_of": 56}),
    "2": (
        {"num_key_value_heads": 4, "hidden_size": 96, "head_dim": 24, "intermediate_size": 256},
        {"multiple_of": 256},
    ),
    "3": ({"rope_theta": 500000.0, "intermediate_size": 112}, {"rope_theta": 500000.0}),
    "3.1": (
        {"rope_theta": 500000.0, "rope_scaling": {**_SCALED, "factor": 8.0}},
        {"use_scaled_rope": True},
    ),
    "3.2": (
        {"tie_word_embeddings": True, "rope_scaling": {**_SCALED, "factor": 32.0},
         "rms_norm_eps": 1e-5},
        {"rope_scaling_factor": 32.0, "norm_eps": 1e-5},
    ),
    "narrow": ({"intermediate_size": 20}, {"multiple_of": 20}),
}  # fmt: skip


class Meta:
    """Meta's Llama, of its own files alone."""

    def __init__(self, folder: Path) -> None:
        file = folder / "consolidated.00.pth"
        self.state = torch.load(file, map_location="cpu", weights_only=True)
        self.params = json.loads((folder / "params.json").read_text(encoding="utf-8"))
        dim, multiple = self.params["dim"], self.params["multiple_of"]
        width = int(2 * (4 * dim) / 3)
        if self.params.get("ffn_dim_multiplier") is not None:
            width = int(self.params["ffn_dim_multiplier"] * width)
        self.width = multiple * ((width + multiple - 1) // multiple)
        self.heads = self.params["n_heads"]
        self.groups = self.params.get("n_kv_heads") or self.heads
        self.size = dim // self.heads

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        h = self.state["tok_embeddings.weight"][tokens]
        turns = self.turns(tokens.shape[1])
        for number in range(self.params["n_layers"]):
            part = f"layers.{number}."
            layer = {n.removeprefix(part): t for n, t in self.state.items() if n.startswith(part)}
            h = h + self.attention(self.norm(h, layer["attention_norm.weight"]), layer, turns)
            h = h + self.feed_forward(self.norm(h, layer["ffn_norm.weight"]), layer)
        return self.norm(h, self.state["norm.weight"]) @ self.state["output.weight"].T

    def norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.params["norm_eps"]) * weight

    def turns(self, length: int) -> torch.Tensor:
        steps = torch.arange(0, self.size, 2)[: self.size // 2].float() / self.size
        freqs = 1.0 / (self.params["rope_theta"] ** steps)
        if self.params.get("use_scaled_rope"):
            freqs = self.scaled(freqs, self.params.get("rope_scaling_factor") or 8)
        angles = torch.outer(torch.arange(length).float(), freqs)
        return torch.polar(torch.ones_like(angles), angles)

    def scaled(self, freqs: torch.Tensor, factor: float) -> torch.Tensor:
        low, high, context = 1, 4, 8192
        made = []
        for freq in freqs:
            length = 2 * math.pi / freq
            if length < context / high:
                made.append(freq)
            elif length > context / low:
                made.append(freq / factor)
            else:
                smooth = (context / length - low) / (high - low)
                made.append((1 - smooth) * freq / factor + smooth * freq)
        return torch.tensor(made)

    def attention(
        self, x: torch.Tensor, layer: dict[str, torch.Tensor], turns: torch.Tensor
    ) -> torch.Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            (x @ layer[f"attention.{name}.weight"].T).view(batch, length, heads, self.size)
            for name, heads in (("wq", self.heads), ("wk", self.groups), ("wv", self.groups))
        )
        q, k = (self.turned(each, turns) for each in (q, k))
        k, v = (each.repeat_interleave(self.heads // self.groups, 2) for each in (k, v))
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        scores = q @ k.transpose(2, 3) / math.sqrt(self.size)
        scores = scores + torch.triu(torch.full((length, length), float("-inf")), 1)
        made = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, -1)
        return made @ layer["attention.wo.weight"].T

    def turned(self, x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turns[None, :, None]).flatten(3)

    def feed_forward(self, x: torch.Tensor, layer: dict[str, torch.Tensor]) -> torch.Tensor:
        w1, w2, w3 = (layer[f"feed_forward.{name}.weight"] for name in ("w1", "w2", "w3"))
        assert w1.shape == w3.shape == (self.width, self.params["dim"])
        return (F.silu(x @ w1.T) * (x @ w3.T)) @ w2.T


@pytest.mark.parametrize("generation", CASES)
def test_metas_model_says_what_transformers_says(generation: str, tmp_path: Path) -> None:
    changes, stated = CASES[generation]
    folder = model("llama", tmp_path / "model", **changes)
    report = reshard.convert(folder, tmp_path / "meta", to="meta")
    assert report.verified
    there = Meta(tmp_path / "meta")
    assert there.params.items() >= stated.items()
    with torch.no_grad():
        hub = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        expected, found = hub(TOKENS).logits, there(TOKENS)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("generation", ["1", "3.2"])
def test_there_and_back_is_the_identity(generation: str, tmp_path: Path) -> None:
    """By the folder or by the file, compared by the hub's names as well."""
    folder = model("llama", tmp_path / "model", **CASES[generation][0])
    reshard.convert(folder, tmp_path / "meta", to="meta")
    assert reshard.verify(tmp_path / "meta").num_tensors
    assert reshard.verify(tmp_path / "meta", folder).num_tensors
    assert reshard.diff(tmp_path / "meta", folder).same
    assert reshard.inspect(tmp_path / "meta", base=folder).fitting.fits  # type: ignore[union-attr]
    base = model("llama", tmp_path / "base", seed=1, **CASES[generation][0])
    for number, source in enumerate(("meta", "meta/consolidated.00.pth")):
        out = tmp_path / f"back-{number}"
        report = reshard.convert(tmp_path / source, out, base=base)
        assert report.to_json()["source"]
        assert digested(out) == digested(folder)
    edit_weights(folder, lambda state: state["model.norm.weight"].add_(1))
    with pytest.raises(reshard.VerificationError, match=r"norm\.weight"):
        reshard.verify(tmp_path / "meta", folder)


def test_a_training_checkpoint_becomes_one_by_its_base(tmp_path: Path) -> None:
    base = model("llama", tmp_path / "base")
    trained = load_file(model("llama", tmp_path / "trained", seed=1) / "model.safetensors")
    torch.save(trained, tmp_path / "run.pt")
    reshard.convert(tmp_path / "run.pt", tmp_path / "meta", to="meta", base=base, dtype="bfloat16")
    state = Meta(tmp_path / "meta").state
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert torch.equal(state["norm.weight"], trained["model.norm.weight"].bfloat16())
    with pytest.raises(reshard.PlanError, match="needs the model's config"):
        reshard.convert(tmp_path / "run.pt", tmp_path / "again", to="meta")


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("qwen2", {}, "model_type is 'qwen2'"),
        ("gemma", {}, "model_type is 'gemma'"),
        ("mistral", {}, "model_type is 'mistral'"),
        ("llama", {"head_dim": 16}, "heads have 16 rows"),
        ("llama", {"hidden_act": "gelu"}, "activation is 'gelu'"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "'linear'"),
        (
            "llama",
            {"rope_scaling": {**_SCALED, "factor": 8.0, "high_freq_factor": 8.0}},
            "another way",
        ),
    ],
)
def test_what_metas_code_does_not_compute(
    family: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    """The hint is followed: the hub's files hold it."""
    folder = model(family, tmp_path / "model", **changes)
    with pytest.raises(reshard.UnsupportedError, match=f"Llama 1 to 3.*{words}") as caught:
        reshard.convert(folder, tmp_path / "meta", to="meta")
    assert not (tmp_path / "meta").exists()
    assert str(caught.value.hint).startswith("Pass --to hf")
    assert reshard.convert(folder, tmp_path / "out", to="hf").verified


def test_tensors_without_a_place_or_lost(tmp_path: Path) -> None:
    folder = model("llama", tmp_path / "biased", attention_bias=True)
    with pytest.raises(reshard.NamesError, match="no place in Meta's Llama"):
        reshard.convert(folder, tmp_path / "meta", to="meta")
    folder, base = model("llama", tmp_path / "model"), model("llama", tmp_path / "base", seed=1)
    lost = "model.layers.1.mlp.up_proj.weight"
    edit_weights(folder, lambda state: state.pop(lost))
    with pytest.raises(reshard.NamesError, match=r"lacks: layers\.1\.feed_forward\.w3") as caught:
        reshard.convert(folder, tmp_path / "meta", to="meta")
    assert "--fill-from-base" in str(caught.value.hint)
    reshard.convert(folder, tmp_path / "filled", to="meta", base=base, fill_from_base=True)
    found = torch.load(tmp_path / "filled" / "consolidated.00.pth")[
        "layers.1.feed_forward.w3.weight"
    ]
    assert torch.equal(found, load_file(base / "model.safetensors")[lost])


def test_a_config_of_another_model(tmp_path: Path) -> None:
    for field, value, words in (
        ("num_hidden_layers", 1, "no place in Meta's Llama"),
        ("intermediate_size", 48, "the config's model has"),
        ("intermediate_size", None, "^the config states no intermediate_size, which is needed"),
    ):
        folder = model("llama", tmp_path / field)
        edit_config(folder, **{field: value})
        with pytest.raises(reshard.NamesError, match=words):
            reshard.convert(folder, tmp_path / "meta", to="meta")


def test_params_that_are_not_the_bases(tmp_path: Path) -> None:
    """Heads of another number have the same shapes, and would be turned wrongly."""
    folder = model("llama", tmp_path / "model", num_key_value_heads=4)
    reshard.convert(folder, tmp_path / "meta", to="meta")
    edit_config(folder, num_attention_heads=8, num_key_value_heads=8, head_dim=4)
    for source in ("meta", "meta/consolidated.00.pth"):
        with pytest.raises(reshard.NamesError, match=r"params\.json says n_heads 4.* 8"):
            reshard.convert(tmp_path / source, tmp_path / "out", base=folder)


def test_parts_of_several_gpus(tmp_path: Path) -> None:
    """Refused, by the folder and by a file, and the hint is followed."""
    folder = model("llama", tmp_path / "model")
    reshard.convert(folder, tmp_path / "meta", to="meta")
    one = tmp_path / "meta" / "consolidated.00.pth"
    one.with_name("consolidated.01.pth").write_bytes(one.read_bytes())
    for path in (tmp_path / "meta", one):
        with pytest.raises(reshard.UnsupportedError, match="2 files") as caught:
            reshard.open(path)
        assert caught.value.hint == "Convert the model as the hub has it."
    assert reshard.convert(folder, tmp_path / "out", to="dcp").verified


def test_what_is_no_state_dict(tmp_path: Path) -> None:
    torch.save(
        {"tok_embeddings.weight": torch.ones(2), "step": 3}, tmp_path / "consolidated.00.pth"
    )
    with pytest.raises(reshard.UnsupportedError, match="something else"):
        reshard.open(tmp_path)


def test_the_original_folder_beside_the_hubs_files(tmp_path: Path) -> None:
    """A release has Meta's files in `original/`: the hub's are read, and those where named."""
    folder = model("llama", tmp_path / "release")
    reshard.convert(folder, tmp_path / "meta", to="meta")
    (tmp_path / "meta").rename(folder / "original")
    assert reshard.open(folder).format == "huggingface"
    assert reshard.open(folder / "original").format == "meta"


def test_options_of_other_formats(tmp_path: Path) -> None:
    folder = model("llama", tmp_path / "model")
    with pytest.raises(reshard.OptionError, match="all tensors are one file"):
        reshard.convert(folder, tmp_path / "meta", to="meta", max_shard_size="1GB")
    with pytest.raises(reshard.OptionError, match="names of that trainer"):
        reshard.convert(folder, tmp_path / "meta", to="meta", names="disk")


@given(st.integers(1, 1 << 14).map(lambda n: 8 * n), st.integers(1, 1 << 17))
def test_every_width_is_stated(dim: int, width: int) -> None:
    assert meta.feed_forward(dim, *meta.width_of(dim, width)) == width
