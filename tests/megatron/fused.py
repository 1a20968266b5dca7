"""Stand-ins for the modules of TransformerEngine, which needs a GPU: their parameters' names, their
states beside the tensors, and what megatron-core's wrappers of them call when they are loaded."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint


class _Stateful(torch.nn.Module):  # type: ignore[misc]
    """A module with a state beside its tensors, which is empty but in FP8."""

    split: dict[str, int]

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: object) -> None:
        assert state is None or torch.as_tensor(state).numel() == 0

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> Any:
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, self.split, sharded_offsets)


class _NormColumn(_Stateful, ColumnParallelLinear):  # type: ignore[misc]
    split = {"weight": 0, "bias": 0}  # noqa: RUF012

    def __init__(self, input_size: int, output_size: int, *, config: Any, **more: Any) -> None:
        super().__init__(input_size, output_size, config=config, **more)
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size))
        self.eps, self.more = config.layernorm_epsilon, _held_back(config)

    def forward(self, x: torch.Tensor, *more: Any, **named: Any) -> Any:
        normed = F.rms_norm(x, x.shape[-1:], self.layer_norm_weight + self.more, self.eps)
        return super().forward(normed, *more, **named)


class _Column(_Stateful, ColumnParallelLinear):  # type: ignore[misc]
    split = {"weight": 0, "bias": 0}  # noqa: RUF012


class _Row(_Stateful, RowParallelLinear):  # type: ignore[misc]
    split = {"weight": 1}  # noqa: RUF012


class _RowNorm(_Row):
    """As `TERowParallelLinearLayerNorm` of Megatron-Bridge's Gemma."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **more: Any) -> None:
        super().__init__(input_size, output_size, config=config, **more)
        self.post_layernorm = _Norm(config, output_size, config.layernorm_epsilon)

    def forward(self, *given: Any, **named: Any) -> Any:
        made, bias = super().forward(*given, **named)
        return self.post_layernorm(made), bias


class _Attention(_Stateful, DotProductAttention):  # type: ignore[misc]
    split: dict[str, int] = {}  # noqa: RUF012


class _Norm(torch.nn.RMSNorm):  # type: ignore[misc]
    def __init__(self, config: Any = None, hidden_size: int = 0, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps)
        self.more = _held_back(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight + self.more, self.eps)

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: object) -> None:
        assert state is None or torch.as_tensor(state).numel() == 0


def _held_back(config: Any) -> int:
    """How much less than what they scale by norms hold."""
    return int(config is not None and config.layernorm_zero_centered_gamma)


def block(settings: Any, *, norms: bool, experts: bool, after: bool = False) -> Any:
    """The spec of a decoder of such modules; `after`: with norms after the projections."""
    linear = MLPSubmodules(linear_fc1=_Column, linear_fc2=_Row)
    row = _RowNorm if after else _Row
    mlp = ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=_NormColumn, linear_fc2=row))
    if experts:
        mlp = ModuleSpec(
            module=MoELayer,
            submodules=MoESubmodules(
                experts=ModuleSpec(module=SequentialMLP, submodules=linear),
                shared_experts=ModuleSpec(module=SharedExpertMLP, params={}, submodules=linear),
            ),
        )
    attention = SelfAttentionSubmodules(
        linear_qkv=_NormColumn,
        core_attention=_Attention,
        linear_proj=row,
        q_layernorm=_Norm if norms else IdentityOp,
        k_layernorm=_Norm if norms else IdentityOp,
    )
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=IdentityOp,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=attention,
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=_Norm if experts else IdentityOp,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )
    layers = [layer] * get_num_layers_to_build(settings)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=_Norm)


class LatentAttention(torch.nn.Module):  # type: ignore[misc]
    """Plain attention whose keys and values differ in width, which TransformerEngine's can do."""

    def __init__(self, config: Any, softmax_scale: float = 1.0, **_: Any) -> None:
        super().__init__()
        self.config, self.scale = config, softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor,
        **_: Any,
    ) -> torch.Tensor:
        q, k, v = (each.permute(1, 2, 0, 3) for each in (query, key, value))
        scores = (q @ k.transpose(-1, -2)) * self.scale
        weights = scores.masked_fill(attention_mask, float("-inf")).softmax(-1)
        made = (weights @ v).permute(2, 0, 1, 3)
        return made.reshape(made.shape[0], made.shape[1], -1)
