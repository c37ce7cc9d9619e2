# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Quantized embeddings and output heads, based on the linear method."""

from typing import Any

import torch
from vllm.model_executor.layers.vocab_parallel_embedding import (
    UnquantizedEmbeddingMethod,
)

from vllm_ascend_ct import compat
from vllm_ascend_ct.kernels.embedding import dequantized_rows
from vllm_ascend_ct.quantization.compressed_tensors.linear_method import (
    AscendCTLinearMethod,
)
from vllm_ascend_ct.quantization.compressed_tensors.refusals import tied_otherwise


class AscendCTEmbeddingMethod(AscendCTLinearMethod):
    """A weight-only embedding that an output head may be tied to.

    Upstream's embedding method uses a Triton kernel, supports symmetric weights only,
    and does not support a tied output head.
    """

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        super().create_weights(layer, *args, **kwargs)
        if not compat.METHODS_TIE_WEIGHTS:
            # A tied head takes over this parameter and finds the embedding through it.
            weight: Any = torch.nn.Parameter(torch.empty(0), requires_grad=False)
            weight.embedding = layer
            layer.register_parameter("weight", weight)

    def embedding(self, layer: Any, input_: torch.Tensor) -> torch.Tensor:
        offset = getattr(layer, "weight_zero_point", None)
        return dequantized_rows(input_, layer.weight, layer.weight_scale, offset)


class AscendCTHeadMethod(AscendCTLinearMethod):
    """A quantized output head."""

    def __init__(self, config: Any, args: dict[str, Any], prefix: str) -> None:
        """Keep the head's name for errors: the layer has none until vLLM 0.31."""
        super().__init__(config, args)
        self._prefix = prefix

    def tie_weights(self, layer: Any, embed_tokens: Any) -> torch.nn.Module:
        # Some models use `torch.nn.Embedding`, which has no method.
        method = getattr(embed_tokens, "quant_method", None)
        if not isinstance(method, AscendCTLinearMethod) or method._args != self._args:
            raise tied_otherwise(self._prefix)
        tied: torch.nn.Module = embed_tokens
        return tied

    def process_weights_after_loading(self, layer: Any) -> None:
        if (embedding := _tied_embedding(layer)) is None:
            super().process_weights_after_loading(layer)
            return
        # Raises an error if the embedding has another scheme.
        self.tie_weights(layer, embedding)
        for name in layer._parameters.keys() - {"weight", "bias"}:
            delattr(layer, name)

    def apply(
        self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        if (embedding := _tied_embedding(layer)) is not None:
            layer = embedding
        y: torch.Tensor = super().apply(layer, x, bias)
        return y


class AscendCTUnquantizedHeadMethod(UnquantizedEmbeddingMethod):
    """An unquantized output head, which may be tied to a quantized embedding."""

    def tie_weights(self, layer: Any, embed_tokens: Any) -> torch.nn.Module:
        # Some models use `torch.nn.Embedding`, which has no method.
        method = getattr(embed_tokens, "quant_method", None)
        if isinstance(method, AscendCTEmbeddingMethod):
            tied: torch.nn.Module = embed_tokens
            return tied
        tied = super().tie_weights(layer, embed_tokens)
        return tied

    def process_weights_after_loading(self, layer: Any) -> None:
        if _tied_embedding(layer) is None:
            super().process_weights_after_loading(layer)

    def apply(
        self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        y: torch.Tensor
        if (embedding := _tied_embedding(layer)) is not None:
            y = embedding.quant_method.apply(embedding, x, bias)
        else:
            y = super().apply(layer, x, bias)
        return y


def _tied_embedding(layer: Any) -> Any | None:
    """The embedding that a head is tied to; None otherwise, and on newer vLLM.

    Only for releases without `compat.METHODS_TIE_WEIGHTS`.
    """
    return getattr(getattr(layer, "weight", None), "embedding", None)
