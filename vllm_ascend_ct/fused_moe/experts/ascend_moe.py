# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Base of the kinds of quantized experts on Ascend."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig

from vllm_ascend_ct.fused_moe.activation import supports
from vllm_ascend_ct.fused_moe.functional import Activation, Operands
from vllm_ascend_ct.ops.limits import current_limits
from vllm_ascend_ct.ops.precedents import Form


class AscendExperts(ABC):
    """A rank's experts of one layer: their weights and the two products with them.

    `lay_out` repacks the weights from the checkpoint's layout `[E, N, K]`. The products
    read the layer's parameters at each call, so that a reload can replace the values
    under a captured graph.

    Attributes:
        quantizes_activations: Whether activations are quantized to int8.
        takes_int8: Whether `gate` accepts rows that are int8 already.

    """

    quantizes_activations = False
    takes_int8 = False

    def __init__(
        self,
        layer: Any,
        moe: FusedMoEConfig,
        activation: Activation | None = None,
        fuses: Callable[[torch.dtype], bool] | None = None,
    ) -> None:
        """Take over the weights that were loaded into a layer.

        Args:
            layer: The layer; its parameters are in the checkpoint's layout.
            moe: The layer's config.
            activation: Function from `[M, N]` to `[M, I]`; None for SwiGLU.
            fuses: Whether vllm-ascend fuses the first int8 product, the activation and
                the quantization of the result, by dtype of the weights. None if this
                package multiplies: it fuses them if the operator supports it.

        """
        self.layer = layer
        self.moe = moe
        self.activation = activation
        self.fuses = fuses

    @classmethod
    @abstractmethod
    def refusal(
        cls, moe: FusedMoEConfig, bits: int, group_size: int, symmetric: bool
    ) -> str | None:
        """Why a layer cannot be computed, or None.

        Args:
            moe: The layer's config.
            bits: Weight width in the checkpoint, 2 to 8.
            group_size: Elements of K that share a scale; 0 for per-channel scales.
            symmetric: Whether the weights have no zero points.

        """

    @classmethod
    def _common_refusal(cls, moe: FusedMoEConfig, product: Any) -> str | None:
        """The part of `refusal` that all kinds share.

        Args:
            moe: The layer's config.
            product: Limits of the operator that multiplies; falsy if the chip lacks it.

        """
        if not product:
            return "the chip has no operator that multiplies quantized experts"
        if not supports(moe.activation):
            return f"activation {moe.activation.value}"
        limits = current_limits().moe_token_unpermute
        return limits.refusal(moe.in_dtype, moe.experts_per_token)

    @staticmethod
    def products(moe: FusedMoEConfig) -> dict[str, tuple[int, int]]:
        """`(K, N)` of the two products, by prefix of their parameters."""
        hidden, intermediate = moe.hidden_dim, moe.intermediate_size_per_partition
        return {"w13": (hidden, 2 * intermediate), "w2": (intermediate, hidden)}

    def lay_out(self) -> None:
        """Repack the loaded weights for the NPU; call it once after each load."""
        bias = getattr(self.layer, "w2_bias", None)
        if bias is not None and self.moe.tp_rank > 0:
            # The ranks' outputs are summed: only one rank may add the bias.
            bias.data.zero_()
        for name, (k, n) in self.products(self.moe).items():
            self._lay_out(name, k, n)

    @abstractmethod
    def _lay_out(self, name: str, k: int, n: int) -> None:
        """Repack one product's weights.

        Args:
            name: Prefix of its parameters, "w13" or "w2".
            k: Input features on this rank.
            n: Output features on this rank.

        """

    @abstractmethod
    def operands(self, name: str) -> Operands:
        """The repacked weights of one product, "w13" or "w2"."""

    @abstractmethod
    def forms(self) -> list[Form]:
        """The operator calls of `gate` and `down` that multiply or quantize."""

    @abstractmethod
    def gate(
        self, rows: torch.Tensor, row_scale: torch.Tensor | None, counts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Multiply by the gate and up projections, and apply the activation.

        Args:
            rows: `[M, H]` of the model's dtype, or int8, sorted by expert.
            row_scale: fp32 `[M]` if the rows are int8.
            counts: int64 `[E]`, number of rows of each expert.

        Returns:
            `[M, I]`, and its scale for `down` if it is quantized.

        """

    @abstractmethod
    def down(
        self, hidden: torch.Tensor, scale: torch.Tensor | None, counts: torch.Tensor
    ) -> torch.Tensor:
        """Multiply the result of `gate` by the down projections.

        Args:
            hidden: `[M, I]`.
            scale: Its scale: fp32 `[M]`, or E8M0 `[M, ceil(I / 64), 2]` of MX formats;
                None if it is not quantized.
            counts: int64 `[E]`, number of rows of each expert.

        Returns:
            `[M, H]` of the model's dtype.

        """


def stored_weight(layer: Any, name: str) -> tuple[str, torch.Tensor]:
    """Name and tensor of the parameter that holds a product's weights.

    Args:
        layer: The layer.
        name: Prefix of the product's parameters, "w13" or "w2".

    Returns:
        `<name>_weight_packed` if the checkpoint's format is packed, otherwise
        `<name>_weight`.

    """
    packed = getattr(layer, f"{name}_weight_packed", None)
    if packed is not None:
        return f"{name}_weight_packed", packed
    return f"{name}_weight", getattr(layer, f"{name}_weight")
