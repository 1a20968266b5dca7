"""Scalar reward models as reshard exports them: a backbone and one head or more on its states.

    model*.safetensors          the backbone, in the layout of its hub model
    reward_head.safetensors     for each head type t:
        {t}_head.0.weight [H, H]   {t}_head.0.bias [H]    Linear
        {t}_head.1.weight [H]                             RMSNorm; modules 2 and 4 (SiLU, Sigmoid)
        {t}_head.3.weight [1, H]                          Linear without bias      hold no weights
        {t}_attnpool.query [H]  .k.weight [H, H]  .v.weight [H, H]    only with attention pooling
        {t}_logit_scale [1]                               optional; used in training only
    reward_config.json          head_types, pooling_method (attn, last), num_heads,
                                probing_layer, scale_for_train, hidden_size (H)

Source: LightRFT at commit 49e62cb, lightrft/models/srm_vl.py, srm_al.py and utils.py. Three points
change the scores if they differ: RMSNorm has PyTorch's default epsilon (that of float32 for float32
and 16-bit inputs, torch 2.13); `probing_layer` -1 means `hidden_states[num_hidden_layers - 1]`, the
input of the last layer; position ids count the attention mask and are passed to the backbone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch.nn import functional

from reshard.errors import FormatError, IncompleteError, NamesError
from reshard.evaluate.folder import parse_json
from reshard.naming.rewards import REWARD_CONFIG, REWARD_HEAD
from reshard.storage.paths import is_file

Pooling = Literal["attn", "last"]


@dataclass(frozen=True, slots=True)
class RewardConfig:
    """`reward_config.json`. `probing_layer` counts hidden states; negative ones from the layers'
    number down."""

    head_types: tuple[str, ...]
    pooling_method: Pooling
    num_heads: int
    probing_layer: int
    scale_for_train: bool
    hidden_size: int


def parse_reward_config(path: Path) -> RewardConfig:
    """Read `reward_config.json`; raises `FormatError` with the field that is wrong."""
    raw = parse_json(path)

    def field(name: str, kind: type, default: object = None) -> Any:
        value = raw.get(name, default)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise FormatError(f"`{name}` must be {kind.__name__}, not {value!r}.", path=path)
        return value

    heads = field("head_types", list)
    if not heads or not all(isinstance(head, str) for head in heads):
        raise FormatError(f"`head_types` must be a list of names, not {heads!r}.", path=path)
    pooling = field("pooling_method", str)
    if pooling not in ("attn", "last"):
        raise FormatError(f"`pooling_method` must be attn or last, not {pooling!r}.", path=path)
    config = RewardConfig(
        head_types=tuple(heads),
        pooling_method=pooling,
        num_heads=field("num_heads", int, 4),
        probing_layer=field("probing_layer", int),
        scale_for_train=field("scale_for_train", bool, False),
        hidden_size=field("hidden_size", int),
    )
    if config.num_heads < 1 or config.hidden_size % config.num_heads:
        raise FormatError(
            f"`hidden_size` {config.hidden_size} is not a multiple of `num_heads` "
            f"{config.num_heads}.",
            path=path,
        )
    return config


@dataclass(frozen=True, slots=True)
class ScalarReward:
    """A backbone with reward heads. `tensors` are those of `reward_head.safetensors`."""

    backbone: Any
    config: RewardConfig
    tensors: Mapping[str, torch.Tensor]

    @property
    def layer(self) -> int:
        """Index into `hidden_states` of the states that are probed."""
        if self.config.probing_layer >= 0:
            return self.config.probing_layer
        text = self.backbone.config.get_text_config()
        return int(text.num_hidden_layers) + self.config.probing_layer

    def parameters(self) -> Iterator[torch.Tensor]:
        """Every weight, the backbone's and the heads'."""
        yield from self.backbone.parameters()
        yield from self.tensors.values()

    def score(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Score a batch of encoded prompts: head -> [B] float32 in (0, 1), on the CPU."""
        mask = inputs["attention_mask"]
        positions = (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 1)
        with torch.inference_mode():
            output = self.backbone(
                **inputs, position_ids=positions, output_hidden_states=True, use_cache=False
            )
            states = output.hidden_states[self.layer]
            return {name: self._head(name, states, mask) for name in self.config.head_types}

    def _head(self, name: str, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        weights = {key: self.tensors[key] for key in _head_shapes(name, self.config)}
        first = weights[f"{name}_head.0.weight"]
        states, mask = states.to(first.device, first.dtype), mask.to(first.device)
        if self.config.pooling_method == "attn":
            query, key, value = (weights[f"{name}_attnpool.{part}"] for part in _POOLING)
            pooled = pool_attention(states, mask, query, key, value, self.config.num_heads)
        else:
            pooled = pool_last(states, mask)
        hidden = functional.linear(pooled, first, weights[f"{name}_head.0.bias"])
        hidden = functional.rms_norm(hidden, hidden.shape[-1:], weights[f"{name}_head.1.weight"])
        score = functional.linear(functional.silu(hidden), weights[f"{name}_head.3.weight"])
        return torch.sigmoid(score).float().squeeze(-1).cpu()


def pool_attention(
    states: torch.Tensor,
    mask: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_heads: int,
) -> torch.Tensor:
    """Pool [B, S, H] to [B, H] by one learned query, where `mask` [B, S] is not zero.

    LightRFT attends to padding as well; for a row without padding both are the same.
    """
    batch, length, hidden = states.shape
    split = (batch, length, num_heads, hidden // num_heads)
    keys = functional.linear(states, key).reshape(split).permute(0, 2, 1, 3)
    values = functional.linear(states, value).reshape(split).permute(0, 2, 1, 3)
    weights = query.reshape(1, num_heads, 1, -1) @ keys.transpose(-2, -1)
    weights = weights * (hidden // num_heads) ** -0.5
    weights = weights.masked_fill(mask[:, None, None, :] == 0, float("-inf"))
    return (torch.softmax(weights, dim=-1) @ values).reshape(batch, hidden)


def pool_last(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The state of each row's last position that is not padding: [B, S, H] -> [B, H]."""
    last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(dim=1)
    return states[torch.arange(states.shape[0], device=states.device), last]


def load_reward(folder: Path, backbone: Any) -> ScalarReward:
    """Put the heads of an export on its backbone, in the dtype that they are stored in.

    Raises `FormatError` (an impossible config), `IncompleteError` (no head file) and
    `NamesError` (heads other than the config's, with both lists).
    """
    config = parse_reward_config(folder / REWARD_CONFIG)
    _check_backbone(folder, backbone, config)
    path = folder / REWARD_HEAD
    if not is_file(path):
        raise IncompleteError("the export of a reward model lacks its heads.", path=path)
    stored = load_file(path, device=str(backbone.device))
    tensors = {name: t for name, t in stored.items() if not name.endswith("_logit_scale")}
    expected = {k: v for name in config.head_types for k, v in _head_shapes(name, config).items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if expected != found:
        raise NamesError(
            "the heads are not those that reward_config.json describes: "
            f"missing {_differing(expected, found)}; unexpected {_differing(found, expected)}.",
            missing=tuple(expected.keys() - found.keys()),
            unexpected=tuple(found.keys() - expected.keys()),
            path=path,
        )
    return ScalarReward(backbone, config, tensors)


_POOLING = ("query", "k.weight", "v.weight")


def _head_shapes(name: str, config: RewardConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of one head, with their shapes."""
    width = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        f"{name}_head.0.weight": (width, width),
        f"{name}_head.0.bias": (width,),
        f"{name}_head.1.weight": (width,),
        f"{name}_head.3.weight": (1, width),
    }
    if config.pooling_method == "attn":
        pooling: tuple[tuple[int, ...], ...] = ((width,), (width, width), (width, width))
        shapes |= {f"{name}_attnpool.{p}": s for p, s in zip(_POOLING, pooling, strict=True)}
    return shapes


def _differing(shapes: Mapping[str, tuple[int, ...]], others: Mapping[str, tuple[int, ...]]) -> str:
    names = [f"{n} {list(s)}" for n, s in sorted(shapes.items()) if others.get(n) != s]
    return ", ".join(names) or "none"


def _check_backbone(folder: Path, backbone: Any, config: RewardConfig) -> None:
    text = backbone.config.get_text_config()
    width, layers = int(text.hidden_size), int(text.num_hidden_layers)
    if width != config.hidden_size:
        raise FormatError(
            f"`hidden_size` is {config.hidden_size}, but the backbone's is {width}.",
            path=folder / REWARD_CONFIG,
        )
    if not -layers <= config.probing_layer < layers:
        raise FormatError(
            f"`probing_layer` {config.probing_layer} is not among the {layers} layers.",
            path=folder / REWARD_CONFIG,
        )
