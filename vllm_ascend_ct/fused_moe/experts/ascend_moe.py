# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Experts on Ascend, as upstream's `fused_moe/experts`: what all of them share."""

from abc import abstractmethod
from typing import Any

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEParallelConfig,
    FusedMoEQuantConfig,
)
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import (
    TopKWeightAndReduceNoOP,
)

from vllm_ascend_ct.compat import UnfinalizedMoEOutput, load_format
from vllm_ascend_ct.errors import Remedy, broken_checkpoint
from vllm_ascend_ct.fused_moe.activation import activation_function, supports
from vllm_ascend_ct.fused_moe.functional import (
    Activation,
    Operands,
    SortedTokens,
    combine,
    sort_tokens,
)
from vllm_ascend_ct.kernels.announce import announce
from vllm_ascend_ct.ops.limits import current_limits
from vllm_ascend_ct.ops.precedents import Form


class AscendExperts(mk.FusedMoEExpertsModular):
    """Sorts tokens by expert, multiplies twice and brings the rows back.

    Weights come as they are in the checkpoint, `[E, N, K]`, and are laid out by
    `process_weights_after_loading`; the layer's parameters are what is read later, so
    that they can be loaded again under a captured graph.

    Attributes:
        defers_finalize: Whether the caller of the modular kernel calls `finalize`;
            otherwise the kernel's output is a buffer, to which rows are copied.

    """

    quantizes_activations = False

    def __init__(
        self, moe_config: FusedMoEConfig, quant_config: FusedMoEQuantConfig
    ) -> None:
        super().__init__(moe_config, quant_config)
        self.defers_finalize = False
        self._activation: Activation | None = None
        self._layer: Any = None
        self._experts = (0, moe_config.num_local_experts)

    @classmethod
    @abstractmethod
    def refusal(
        cls, moe: FusedMoEConfig, bits: int, group_size: int, symmetric: bool
    ) -> str | None:
        """Why a layer cannot be computed, or None.

        Args:
            moe: The layer.
            bits: Of its weights, 2 to 8.
            group_size: Elements of K that share a scale; 0 for one per channel.
            symmetric: Whether weights have no zero points.

        """

    @classmethod
    def _common_refusal(cls, moe: FusedMoEConfig) -> str | None:
        limits = current_limits()
        if not limits.grouped_matmul:
            return "the chip has no product of quantized experts"
        if not supports(moe.activation):
            return f"activation {moe.activation.value}"
        return limits.moe_token_unpermute.refusal(moe.in_dtype, moe.experts_per_token)

    @staticmethod
    def products(moe: FusedMoEConfig) -> dict[str, tuple[int, int]]:
        """K and N of the two products, by the prefix of their parameters."""
        hidden, intermediate = moe.hidden_dim, moe.intermediate_size_per_partition
        return {"w13": (hidden, 2 * intermediate), "w2": (intermediate, hidden)}

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Lay out the weights of a layer, and serve it from then on."""
        bias = getattr(layer, "w2_bias", None)
        if bias is not None and self.moe_config.tp_rank > 0:
            # What ranks compute is summed.
            bias.data.zero_()
        if self.quant_config.w1_scale is not None and load_format() != "dummy":
            # From upstream's methods, which look at no values.
            _check_scales(layer)
        for name, (k, n) in self.products(self.moe_config).items():
            self._lay_out(layer, name, k, n)
        self._layer = layer
        announce(self, *self._forms())
        self._prepare_forward(getattr(layer, "_expert_map", None))

    @abstractmethod
    def _forms(self) -> list[Form]:
        """The calls that multiply, and quantize in between."""

    @abstractmethod
    def _lay_out(self, layer: Any, name: str, k: int, n: int) -> None:
        """Lay out one product's weights."""

    @abstractmethod
    def gate(
        self, rows: torch.Tensor, row_scale: torch.Tensor | None, counts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Multiply by gates and ups, and apply the activation.

        Args:
            rows: `[M, H]` of the model's dtype, or int8, sorted by expert.
            row_scale: fp32 `[M]` of int8 rows.
            counts: int64, rows of each expert.

        Returns:
            `[M, I]`, and its scale if it is int8.

        """

    @abstractmethod
    def down(
        self, hidden: torch.Tensor, scale: torch.Tensor | None, counts: torch.Tensor
    ) -> torch.Tensor:
        """Multiply what `gate` returned by downs.

        Returns:
            `[M, H]` of the model's dtype.

        """

    @abstractmethod
    def operands(self, name: str) -> Operands:
        """What `_lay_out` left in the layer."""

    def _prepare_forward(self, expert_map: torch.Tensor | None) -> None:
        """Find out which experts are here: a range, or a table to look them up in."""
        self._activation = activation_function(
            self.moe_config.activation, self.activation_config
        )
        local_ids = None
        if expert_map is not None:
            here = (expert_map >= 0).nonzero().flatten()
            self._experts = int(here[0]), int(here[-1]) + 1
            if self._experts[1] - self._experts[0] > len(here):
                # Those of other ranks are behind the last.
                self._experts = 0, len(here)
                local_ids = torch.where(expert_map >= 0, expert_map, len(here)).int()
        self._layer.register_buffer("local_expert_ids", local_ids, persistent=False)

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: MoEActivation,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        a1q_scale: torch.Tensor | None,
        a2_scale: torch.Tensor | None,
        workspace13: torch.Tensor,
        workspace2: torch.Tensor,
        expert_tokens_meta: mk.ExpertTokensMetadata | None,
        apply_router_weight_on_input: bool,
    ) -> Any:
        """Compute experts; see upstream's `FusedMoEExpertsModular.apply`.

        Returns:
            None, the result being in `output`; or, deferred, what `finalize` takes.

        """
        local_ids = self._layer.local_expert_ids
        if local_ids is not None:
            topk_ids, global_num_experts = local_ids[topk_ids], len(w1) + 1
        topk_ids = topk_ids.to(torch.int32)
        tokens = self._sort(hidden_states, topk_ids, global_num_experts)
        hidden, scale = self.gate(tokens.rows, tokens.scale, tokens.counts)
        rows = self.down(hidden, scale, tokens.counts)
        if self.defers_finalize:
            index = tokens.row_index.view(topk_ids.shape)
            return UnfinalizedMoEOutput(rows, topk_weights, index)
        weights = None if apply_router_weight_on_input else topk_weights
        output.copy_(self.finalize(rows, tokens.row_index, weights, topk_ids))
        return None

    def _sort(
        self, x: torch.Tensor, topk_ids: torch.Tensor, num_experts: int
    ) -> SortedTokens:
        """Sort tokens by expert, as `gate` takes them."""
        return sort_tokens(
            x, topk_ids, self._experts, num_experts, self.quantizes_activations
        )

    def finalize(
        self,
        rows: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor | None,
        topk_ids: torch.Tensor,
    ) -> torch.Tensor:
        """Sum the rows of each token.

        Args:
            rows: `[T * top-k, H]`.
            index: int32, the row of each choice.
            weights: `[T, top-k]`; None if they are in already, for one choice a token.
            topk_ids: `[T, top-k]`.

        Returns:
            `[T, H]`.

        """
        moe = self.moe_config
        all_here = moe.num_local_experts == moe.num_experts
        return combine(rows, index.flatten(), weights, topk_ids, all_here)

    @staticmethod
    def activation_format() -> mk.FusedMoEActivationFormat:
        return mk.FusedMoEActivationFormat.Standard

    @property
    def expects_unquantized_inputs(self) -> bool:
        return True

    @staticmethod
    def _supports_current_device() -> bool:
        return True

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return False

    @staticmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
        return True

    @staticmethod
    def _supports_activation(activation: MoEActivation) -> bool:
        return supports(activation)

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: FusedMoEParallelConfig) -> bool:
        return True

    def finalize_weight_and_reduce_impl(self) -> mk.TopKWeightAndReduce:
        return TopKWeightAndReduceNoOP()

    def workspace_shapes(
        self, M: int, N: int, K: int, *args: Any, **kwargs: Any
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        # The operators allocate what they return.
        return (0,), (0,), (M, K)


def stored_weight(layer: Any, name: str) -> tuple[str, torch.Tensor]:
    """The parameter that holds a product's weights, and what it holds.

    `weight_packed` where the checkpoint's format packs, else `weight`.
    """
    packed = getattr(layer, f"{name}_weight_packed", None)
    if packed is not None:
        return f"{name}_weight_packed", packed
    return f"{name}_weight", getattr(layer, f"{name}_weight")


def _check_scales(layer: Any) -> None:
    """Refuse scales that are not finite and above 0."""
    for name in ("w13", "w2"):
        scale = getattr(layer, f"{name}_weight_scale").data
        right = (scale > 0) & scale.isfinite()
        if not right.all():
            expert = int((~right).flatten(1).any(1).nonzero()[0])
            raise broken_checkpoint(
                f"{name}_weight_scale of expert {expert} of this rank has values that "
                "are not finite and above 0",
                f"layer {getattr(layer, 'layer_name', None)}",
                Remedy.CALIBRATE_AGAIN,
            )
