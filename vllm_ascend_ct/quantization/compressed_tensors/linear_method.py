# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Upstream's linear method on Ascend."""

from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import (
    MPLinearKernel,
)
from vllm.model_executor.layers.linear import (
    LinearBase,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (  # noqa: E501
    CompressedTensorsLinearMethod,
)
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsScheme,
    CompressedTensorsW4A8Int,
    CompressedTensorsW8A8Int8,
)

from vllm_ascend_ct import compat
from vllm_ascend_ct.errors import UnsupportedCheckpointError
from vllm_ascend_ct.kernels.linear.mixed_precision.ascend_wna8 import (
    AscendWNA8LinearKernel,
    with_quantized_activations,
)
from vllm_ascend_ct.ops.limits import current_limits
from vllm_ascend_ct.ops.soc import current_soc
from vllm_ascend_ct.quantization.compressed_tensors.loading import (
    LoadRecord,
    QuantizedShape,
)
from vllm_ascend_ct.quantization.compressed_tensors.schemes.compressed_tensors_wNa16 import (  # noqa: E501
    AscendCTWNA16,
)

logger = init_logger("vllm.ascend_ct.quantization")

_WORD = 32
# Weight-only to upstream's kernel selection, whose config does not name activations.
_PACKED_A8_SCHEMES = tuple(
    scheme
    for scheme in (
        CompressedTensorsW4A8Int,
        AscendCTWNA16,
        compat.CompressedTensorsWNA8Int,
    )
    if scheme is not None
)


@register_weight_loader_v2_supported_method
class AscendCTLinearMethod(CompressedTensorsLinearMethod):
    """Upstream's linear method, with checks and what vllm-ascend's layers need."""

    # vllm-ascend takes a layer to be unquantized where this stays None.
    quant_method: CompressedTensorsScheme | None = None

    def __init__(self, quantization_config: Any, args: dict[str, Any]) -> None:
        super().__init__(quantization_config)
        self._args = args
        self._check_bias = quantization_config.check_bias
        self._record: LoadRecord | None = None

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        prefix = getattr(layer, "prefix", None)
        if reason := self._size_refusal(
            layer,
            (input_size, input_size_per_partition),
            [size for size in output_partition_sizes if size != output_size],
            params_dtype,
        ):
            raise refused(reason, prefix)
        self._record = LoadRecord(layer, str(prefix), self._shape_on_disk(input_size))
        loader = self._record.record(extra_weight_attrs["weight_loader"])
        try:
            super().create_weights(
                layer,
                input_size_per_partition,
                output_partition_sizes,
                input_size,
                output_size,
                params_dtype,
                **{**extra_weight_attrs, "weight_loader": loader},
            )
        except (ValueError, AssertionError) as error:
            raise refused(str(error), prefix) from error
        if getattr(layer, "weight_packed", None) is getattr(layer, "weight", 0):
            # W4A8Int: a reload would take them to be two.
            del layer.weight_packed
        _quantize_activations(layer.scheme, self._args)
        self.quant_method = layer.scheme
        # Upstream's layers do this in their constructors, vllm-ascend's do not.
        if isinstance(layer, LinearBase) and hasattr(layer, "tp_rank"):
            layer.update_param_tp_status()

    def check_loaded(self, layer: Any) -> None:
        """Refuse a layer that the checkpoint did not fill.

        Raises:
            UnsupportedCheckpointError: Names the tensor.

        """
        prefix = getattr(layer, "prefix", None)
        if self._record is not None:
            self._record.check_complete()
            if prefix is not None and getattr(layer, "bias", None) is not None:
                self._check_bias(prefix)

    def process_weights_after_loading(self, layer: Any) -> None:
        self.check_loaded(layer)
        kernel = layer.scheme.kernel
        if isinstance(kernel, MPLinearKernel) and not hasattr(layer, kernel.w_q_name):
            # Kernels know one name; int8 files have another.
            layer.register_parameter(kernel.w_q_name, layer.weight)
        try:
            super().process_weights_after_loading(layer)
        except ValueError as error:
            raise refused(str(error), getattr(layer, "prefix", None)) from error

    def _size_refusal(
        self,
        layer: Any,
        input_sizes: tuple[int, int],
        shards: list[int],
        dtype: torch.dtype,
    ) -> str | None:
        """What upstream does not check or tell a kernel."""
        k, part = input_sizes
        scheme = layer.scheme
        weights = self._args["weights"]
        limits = current_limits()
        if isinstance(scheme, CompressedTensorsW8A8Int8):
            dynamic = not scheme.is_static_input_scheme
            reason = limits.dynamic_quant.refusal(dtype, part) if dynamic else None
            return reason or limits.quant_matmul.refusal(dtype, [part])
        group_size = weights.group_size or 0
        if group_size > 0 and k % group_size:
            return f"K={k}, group_size={group_size}; supported: whole groups"
        if part != k and self._args.get("output_activations") is not None:
            return (
                "output_activations of a layer whose outputs are summed over ranks: a "
                "rank would quantize its share; supported: tensor_parallel_size=1"
            )
        if part != k and part * weights.num_bits % _WORD:
            return (
                f"K={part} of {k} a rank, weights.num_bits={weights.num_bits}; "
                "supported: ranks that begin with a whole word"
            )
        # Upstream pads a vocabulary, and cuts it off before.
        shards = [*shards, getattr(layer, "org_vocab_size", 0)]
        if not weights.symmetric and any(
            size * weights.num_bits % _WORD for size in shards
        ):
            return (
                f"N={shards} of shards, weights.num_bits={weights.num_bits}, "
                "symmetric=False; supported: shards whose zero points fill whole words"
            )
        return None

    def _shape_on_disk(self, k: int) -> QuantizedShape:
        weights = self._args["weights"]
        per_row = weights.strategy != "tensor"
        groups = k // weights.group_size if (weights.group_size or 0) > 0 else 1
        return QuantizedShape(
            k=k,
            bits=weights.num_bits,
            groups=groups if per_row else 0,
            zero_is_none=self._args.get("output_activations") is not None,
        )


def _quantize_activations(scheme: Any, args: dict[str, Any]) -> None:
    """Have a scheme's activations quantized, if there is a kernel for it."""
    weights, inputs = args["weights"], args["input_activations"]
    if (
        inputs is None
        or not isinstance(scheme, _PACKED_A8_SCHEMES)
        or isinstance(scheme.kernel, AscendWNA8LinearKernel)
    ):
        return
    chosen = type(scheme.kernel).__name__
    scheme.kernel, reason = with_quantized_activations(scheme.kernel, inputs.symmetric)
    name = f"W{weights.num_bits}A8"
    if reason is None:
        logger.info_once(
            "Using %s for %s of %s instead of %s, which leaves activations in 16 bits.",
            type(scheme.kernel).__name__,
            type(scheme).__name__,
            name,
            chosen,
        )
    else:
        logger.info_once(
            "%s is served as W%dA16, its activations unquantized: %s.",
            name,
            weights.num_bits,
            reason,
        )


def refused(what: str, layer_name: str | None) -> UnsupportedCheckpointError:
    """Refuse a layer."""
    return UnsupportedCheckpointError(
        what,
        where=f"layer {layer_name} on Ascend {current_soc().value}",
        supported="the schemes that the README lists, within the chip's limits",
        remedy="Quantize the model again with a supported scheme, or add the layer to "
        "`ignore`",
    )
