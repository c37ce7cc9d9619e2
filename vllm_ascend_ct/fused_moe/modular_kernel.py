# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Experts for upstream's modular kernel (`fused_moe/modular_kernel.py`)."""

from typing import Any

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.all2all_utils import (
    maybe_make_prepare_finalize,
)
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEParallelConfig,
    FusedMoEQuantConfig,
)
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import (
    TopKWeightAndReduceNoOP,
)

from vllm_ascend_ct.compat import UnfinalizedMoEOutput
from vllm_ascend_ct.fused_moe.activation import supports
from vllm_ascend_ct.fused_moe.experts.ascend_moe import AscendExperts, stored_weight
from vllm_ascend_ct.fused_moe.functional import combine, sort_tokens
from vllm_ascend_ct.fused_moe.fused_moe_method_base import AscendMethod
from vllm_ascend_ct.kernels.announce import announce
from vllm_ascend_ct.ops.limits import current_limits


class AscendModularExperts(mk.FusedMoEExpertsModular):
    """Sorts tokens by expert, multiplies them and reduces the rows of each token.

    Attributes:
        experts: The layer's repacked experts.
        defers_finalize: Whether the caller of the modular kernel calls `finalize`.
            Otherwise `apply` does, and copies the result to the kernel's output buffer.

    """

    def __init__(
        self, experts: AscendExperts, quant_config: FusedMoEQuantConfig
    ) -> None:
        super().__init__(experts.moe, quant_config)
        self.experts = experts
        self.defers_finalize = False
        self._here = 0, experts.moe.num_local_experts
        self._counted = current_limits().moe_init_routing.counts
        self._find_experts(getattr(experts.layer, "_expert_map", None))
        announce(experts, *experts.forms())

    def _find_experts(self, expert_map: torch.Tensor | None) -> None:
        """Determine this rank's experts: a range of ids, or a table to map ids with."""
        local_ids = None
        if expert_map is not None:
            here = (expert_map >= 0).nonzero().flatten()
            self._here = int(here[0]), int(here[-1]) + 1
            if self._here[1] - self._here[0] > len(here):
                # This rank's experts are not contiguous: renumber them from 0, and map
                # all experts of other ranks to the number after the last.
                self._here = 0, len(here)
                local_ids = torch.where(expert_map >= 0, expert_map, len(here)).int()
        layer = self.experts.layer
        layer.register_buffer("local_expert_ids", local_ids, persistent=False)

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
        """Compute the experts; see upstream's `FusedMoEExpertsModular.apply`.

        Returns:
            None after writing the result to `output`; or an `UnfinalizedMoEOutput` if
            `defers_finalize`.

        """
        experts = self.experts
        local_ids = experts.layer.local_expert_ids
        if local_ids is not None:
            topk_ids, global_num_experts = local_ids[topk_ids], len(w1) + 1
        topk_ids = topk_ids.to(torch.int32)
        tokens = sort_tokens(
            hidden_states,
            topk_ids,
            self._here,
            global_num_experts,
            experts.takes_int8,
            self._counted,
        )
        hidden, scale = experts.gate(tokens.rows, tokens.scale, tokens.counts)
        rows = experts.down(hidden, scale, tokens.counts)
        if self.defers_finalize:
            index = tokens.row_index.view(topk_ids.shape)
            return UnfinalizedMoEOutput(rows, topk_weights, index)
        weights = None if apply_router_weight_on_input else topk_weights
        output.copy_(self.finalize(rows, tokens.row_index, weights, topk_ids))
        return None

    def finalize(
        self,
        rows: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor | None,
        topk_ids: torch.Tensor,
    ) -> torch.Tensor:
        """Top-k reduction: sum the weighted rows of each token.

        Args:
            rows: `[T * top-k, H]`, sorted by expert.
            index: int32, the row of each (token, choice).
            weights: `[T, top-k]`; None with top-1 routing if the inputs were weighted.
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
        # No workspaces: the operators allocate their results.
        return (0,), (0,), (M, K)


class ModularAscendMethod(AscendMethod):
    """Runs experts in upstream's modular kernel."""

    def process_weights_after_loading(self, layer: Any) -> None:
        super().process_weights_after_loading(layer)
        assert self.moe_quant_config is not None
        prepare_finalize = maybe_make_prepare_finalize(
            moe=self.moe,
            quant_config=self.moe_quant_config,
            routing_tables=layer._expert_routing_tables(),
            allow_new_interface=True,
            use_monolithic=False,
        )
        assert prepare_finalize is not None
        experts = AscendModularExperts(self.experts, self.moe_quant_config)
        self.moe_kernel = mk.FusedMoEKernel(prepare_finalize, experts)
        defers = getattr(self.moe_kernel, "supports_deferred_moe_finalize", bool)
        experts.defers_finalize = UnfinalizedMoEOutput is not None and defers()

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        assert self.moe_kernel is not None
        output: Any = self.moe_kernel.apply(
            x,
            stored_weight(layer, "w13")[1],
            stored_weight(layer, "w2")[1],
            topk_weights,
            topk_ids,
            activation=layer.activation,
            global_num_experts=layer.global_num_experts,
            expert_map=layer.expert_map,
            apply_router_weight_on_input=layer.apply_router_weight_on_input,
            shared_experts=shared_experts,
            shared_experts_input=shared_experts_input,
        )
        if isinstance(output, torch.Tensor):
            return output
        experts: Any = self.moe_kernel.fused_experts
        weighted = layer.apply_router_weight_on_input
        result: torch.Tensor = experts.finalize(
            output.gemm2_permuted,
            output.expanded_idx_to_permuted_idx,
            None if weighted else output.expert_weights,
            topk_ids,
        )
        return result
