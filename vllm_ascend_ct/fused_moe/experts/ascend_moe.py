# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The weights of one layer's experts on Ascend: what all kinds of them share."""

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
    """A rank's experts of one layer: their weights, and the two products by them.

    Weights come as they are in the checkpoint, `[E, N, K]`, and are laid out by
    `lay_out`; the layer's parameters are what is read later, so that they can be loaded
    again under a captured graph.

    Attributes:
        quantizes_activations: Whether rows are multiplied in int8.
        takes_int8: Whether `gate` takes rows that are int8 already.

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
        """Take the weights that a layer was loaded with.

        Args:
            layer: Has them.
            moe: Its config.
            activation: From `[M, N]` to `[M, I]`; None for SwiGLU.
            fuses: Whether who multiplies fuses the first product of int8 rows by
                weights of a dtype, the gate and quantizing what it returns. None: as
                the operator can.

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
            moe: The layer.
            bits: Of its weights, 2 to 8.
            group_size: Elements of K that share a scale; 0 for one per channel.
            symmetric: Whether weights have no zero points.

        """

    @classmethod
    def _common_refusal(cls, moe: FusedMoEConfig, product: Any) -> str | None:
        """As `refusal`; `product` is what the limits have of the operator, if any."""
        if not product:
            return "the chip has no product of quantized experts"
        if not supports(moe.activation):
            return f"activation {moe.activation.value}"
        limits = current_limits().moe_token_unpermute
        return limits.refusal(moe.in_dtype, moe.experts_per_token)

    @staticmethod
    def products(moe: FusedMoEConfig) -> dict[str, tuple[int, int]]:
        """K and N of the two products, by the prefix of their parameters."""
        hidden, intermediate = moe.hidden_dim, moe.intermediate_size_per_partition
        return {"w13": (hidden, 2 * intermediate), "w2": (intermediate, hidden)}

    def lay_out(self) -> None:
        """Lay out the weights, once."""
        bias = getattr(self.layer, "w2_bias", None)
        if bias is not None and self.moe.tp_rank > 0:
            # What ranks compute is summed.
            bias.data.zero_()
        for name, (k, n) in self.products(self.moe).items():
            self._lay_out(name, k, n)

    @abstractmethod
    def _lay_out(self, name: str, k: int, n: int) -> None:
        """Lay out one product's weights."""

    @abstractmethod
    def operands(self, name: str) -> Operands:
        """What `_lay_out` left in the layer."""

    @abstractmethod
    def forms(self) -> list[Form]:
        """The calls that multiply, and quantize in between."""

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


def stored_weight(layer: Any, name: str) -> tuple[str, torch.Tensor]:
    """The parameter that holds a product's weights, and what it holds.

    `weight_packed` where the checkpoint's format packs, else `weight`.
    """
    packed = getattr(layer, f"{name}_weight_packed", None)
    if packed is not None:
        return f"{name}_weight_packed", packed
    return f"{name}_weight", getattr(layer, f"{name}_weight")
