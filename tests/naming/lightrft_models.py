"""LightRFT's reward models and critics, re-implemented as far as their state dict and scores go.

Names, shapes and the order of operations are those of lightrft/models (srm_vl, srm_al, grm_vl and
the critics); no line of theirs is here. A backbone is handed in, tiny and of the real class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

HEADS = 4


class AttentionPool(nn.Module):  # type: ignore[misc]
    """Sequence to vector: one learned query over the positions, in four heads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(width))
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        batch, length, width = hidden.shape
        query = self.query.view(1, HEADS, 1, -1).expand(batch, -1, -1, -1)
        key = self.k(hidden).view(batch, length, HEADS, -1).transpose(1, 2)
        value = self.v(hidden).view(batch, length, HEADS, -1).transpose(1, 2)
        pooled = nn.functional.scaled_dot_product_attention(query, key, value)
        return pooled.transpose(1, 2).reshape(batch, width)


class Rewards(nn.Module):  # type: ignore[misc]
    """The heads alone, under the names that they have beside the backbone."""

    def __init__(self, width: int, types: Sequence[str], pooling: str, scaled: bool) -> None:
        super().__init__()
        self.types, self.pooling = tuple(types), pooling
        for kind in types:
            head = nn.Sequential(
                nn.Linear(width, width),
                nn.RMSNorm(width),
                nn.SiLU(),
                nn.Linear(width, 1, bias=False),
                nn.Sigmoid(),
            )
            self.add_module(f"{kind}_head", head)
            if pooling == "attn":
                self.add_module(f"{kind}_attnpool", AttentionPool(width))
            if scaled:
                self.register_parameter(f"{kind}_logit_scale", nn.Parameter(torch.full((1,), 2.5)))

    def scores(self, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
        found = {}
        for kind in self.types:
            pool = getattr(self, f"{kind}_attnpool", None)
            vector = hidden[:, -1] if pool is None else pool(hidden)
            found[kind] = getattr(self, f"{kind}_head")(vector)
        return found


class ScalarRewardModel(Rewards):
    """Backbone under `model`, heads beside it."""

    def __init__(self, backbone: Any, probing_layer: int, width: int, **heads: Any) -> None:
        super().__init__(width, **heads)
        self.model = backbone
        self.probing_layer = probing_layer

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        states = self.model(input_ids=ids, output_hidden_states=True).hidden_states
        # -1 is `hidden_states[L - 1]` of L + 1: what the last layer takes in.
        layers = int(self.model.config.get_text_config().num_hidden_layers)
        layer = self.probing_layer + (layers if self.probing_layer < 0 else 0)
        return self.scores(states[layer])


def rewards_from(
    backbone: Any, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> ScalarRewardModel:
    """A scalar reward model as `reward_config.json` and `reward_head.safetensors` describe it."""
    assert config["num_heads"] == HEADS
    model = ScalarRewardModel(
        backbone,
        config["probing_layer"],
        config["hidden_size"],
        types=config["head_types"],
        pooling=config["pooling_method"],
        scaled=config["scale_for_train"],
    )
    missing, unexpected = model.load_state_dict(dict(tensors), strict=False)
    assert not unexpected
    assert all(name.startswith("model.") for name in missing)
    return model


class Wrapper(nn.Module):  # type: ignore[misc]
    """The generative reward model: a whole language model under `model`."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model


class Critic(nn.Module):  # type: ignore[misc]
    """A backbone under `model` and a value for each token; mean and std are not saved."""

    def __init__(self, backbone: Any, width: int, head: str = "score") -> None:
        super().__init__()
        self.model = backbone
        self.head = head
        self.add_module(head, nn.Linear(width, 1, bias=False))
        self.register_buffer("mean", torch.zeros(1), persistent=False)
        self.register_buffer("std", torch.ones(1), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        values: torch.Tensor = getattr(self, self.head)(self.model(ids).last_hidden_state)
        return values
