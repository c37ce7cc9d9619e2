# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Upstream's linear method, extended for Ascend."""

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
from vllm_ascend_ct.errors import Remedy
from vllm_ascend_ct.kernels.linear.mixed_precision.ascend_wna8 import (
    with_quantized_activations,
)
from vllm_ascend_ct.ops.limits import current_limits
from vllm_ascend_ct.quantization.compressed_tensors import agreement, load_formats
from vllm_ascend_ct.quantization.compressed_tensors.checkpoint import Checkpoint
from vllm_ascend_ct.quantization.compressed_tensors.headers import LayerFiles
from vllm_ascend_ct.quantization.compressed_tensors.loading import LoadRecord
from vllm_ascend_ct.quantization.compressed_tensors.refusals import (
    enough_memory,
    refused,
)
from vllm_ascend_ct.quantization.compressed_tensors.schemes.compressed_tensors_wNa16 import (  # noqa: E501
    AscendCTWNA16,
)
from vllm_ascend_ct.quantization.compressed_tensors.tensors import (
    FloatShape,
    QuantizedShape,
)
from vllm_ascend_ct.quantization.compressed_tensors.utils import is_float

logger = init_logger("vllm.ascend_ct.quantization")

_WORD = 32
# Schemes for which upstream selects a weight-only kernel even if activations are
# quantized, because its kernel config does not describe activations.
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
    """Upstream's method with load checks, for upstream's and vllm-ascend's layers."""

    # vllm-ascend treats a layer as unquantized if this is None.
    quant_method: CompressedTensorsScheme | None = None

    def __init__(self, quantization_config: Any, args: dict[str, Any]) -> None:
        super().__init__(quantization_config)
        self._checkpoint: Checkpoint = quantization_config.checkpoint
        self._args = args
        self._record: LoadRecord | None = None
        self._saving: Any = None

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
        prefix = str(getattr(layer, "prefix", None))
        load_formats.check_load_format(prefix)
        if refusal := self._size_refusal(
            layer,
            (input_size, input_size_per_partition),
            [size for size in output_partition_sizes if size != output_size],
            params_dtype,
        ):
            reason, remedy = refusal
            raise refused(reason, prefix, remedy)
        shape = self._shape_on_disk(input_size)
        self._record = self._checkpoint.record(layer, prefix, shape)
        loader = self._record.record(extra_weight_attrs["weight_loader"])
        attributes = {**extra_weight_attrs, "weight_loader": loader}
        try:
            super().create_weights(
                layer,
                input_size_per_partition,
                output_partition_sizes,
                input_size,
                output_size,
                params_dtype,
                **attributes,
            )
        except (ValueError, AssertionError) as error:
            sizes = input_size_per_partition, sum(output_partition_sizes)
            is_split = sizes != (input_size, output_size)
            remedy = Remedy.CHANGE_RANKS if is_split else Remedy.QUANTIZE_AGAIN
            raise refused(str(error), prefix, remedy) from error
        if getattr(layer, "weight_packed", None) is getattr(layer, "weight", 0):
            # The W4A8Int scheme registers one tensor under both names, which a reload
            # would count as two.
            del layer.weight_packed
        load_formats.mark_scales(layer)
        _quantize_activations(layer.scheme, self._args)
        self.quant_method = layer.scheme
        # Upstream's layers do this in their constructors; vllm-ascend's do not.
        if isinstance(layer, LinearBase) and hasattr(layer, "tp_rank"):
            layer.update_param_tp_status()

    def check_loaded(self, layer: Any) -> None:
        """Refuse a layer with missing tensors, and refuse to save it from now on.

        Raises:
            UnsupportedCheckpointError: A tensor was not loaded; the error names it.

        """
        self._checkpoint.after_loading()
        if self._record is not None:
            if self._record.is_dummy:
                load_formats.make_dummy(layer, self._args["weights"].num_bits)
            else:
                self._record.check_complete()
                if getattr(layer, "bias", None) is not None:
                    agreement.check_bias(self._record.files)
            self._record.files = LayerFiles()
        self._saving = self._saving or load_formats.refuse_saving(layer)

    def process_weights_after_loading(self, layer: Any) -> None:
        self.check_loaded(layer)
        kernel = layer.scheme.kernel
        if isinstance(kernel, MPLinearKernel) and not hasattr(layer, kernel.w_q_name):
            # Kernels expect the name of the packed weight; int8 weights have another.
            layer.register_parameter(kernel.w_q_name, layer.weight)
        prefix = getattr(layer, "prefix", None)
        try:
            with enough_memory(prefix):
                super().process_weights_after_loading(layer)
        except ValueError as error:
            raise refused(str(error), prefix, Remedy.CALIBRATE_AGAIN) from error

    def _size_refusal(
        self,
        layer: Any,
        input_sizes: tuple[int, int],
        shards: list[int],
        dtype: torch.dtype,
    ) -> tuple[str, Remedy] | None:
        """Why the layer's sizes are not supported, with the remedy, or None.

        Checks what upstream neither checks itself nor passes to a kernel.

        Args:
            layer: The layer.
            input_sizes: Input features of the whole layer and of this rank's shard.
            shards: Output features on this rank, by shard of a fused or split layer.
            dtype: dtype of the activations.

        """
        k, part = input_sizes
        scheme = layer.scheme
        weights = self._args["weights"]
        group_size = weights.group_size or 0
        if isinstance(scheme, CompressedTensorsW8A8Int8):
            if reason := _int8_refusal(scheme, dtype, part):
                fits = part != k and _int8_refusal(scheme, dtype, k) is None
                return reason, Remedy.CHANGE_RANKS if fits else Remedy.QUANTIZE_AGAIN
            return None
        if group_size > 0 and k % group_size:
            reason = f"K={k}, group_size={group_size}; supported: whole groups"
            return reason, Remedy.QUANTIZE_AGAIN
        if part != k and self._args.get("output_activations") is not None:
            return (
                "output_activations of a layer whose outputs are summed over ranks: "
                "each rank would quantize its partial sum; supported: "
                "tensor_parallel_size=1"
            ), Remedy.CHANGE_RANKS
        if part != k and part * weights.num_bits % _WORD:
            return (
                f"K={part} of {k} per rank, weights.num_bits={weights.num_bits}; "
                "supported: shards that begin on an int32 boundary"
            ), Remedy.CHANGE_RANKS
        # The checkpoint has the unpadded vocabulary, so check its size too.
        shards = [*shards, getattr(layer, "org_vocab_size", 0)]
        words = [size * weights.num_bits / _WORD for size in shards]
        if not weights.symmetric and not all(map(float.is_integer, words)):
            ranks = getattr(layer, "tp_size", 1)
            fits = all((size * ranks).is_integer() for size in words)
            return (
                f"N={shards} of shards, weights.num_bits={weights.num_bits}, "
                "symmetric=False; supported: shards whose zero points fill whole int32 "
                "words"
            ), Remedy.CHANGE_RANKS if fits else Remedy.QUANTIZE_AGAIN
        return None

    def _shape_on_disk(self, k: int) -> QuantizedShape:
        if is_float(self._args):
            return FloatShape.of(self._args, k)
        weights = self._args["weights"]
        per_row = weights.strategy != "tensor"
        groups = k // weights.group_size if (weights.group_size or 0) > 0 else 1
        return QuantizedShape(
            k=k,
            bits=weights.num_bits,
            groups=groups if per_row else 0,
            zero_is_none=self._args.get("output_activations") is not None,
        )


def _int8_refusal(
    scheme: CompressedTensorsW8A8Int8, dtype: torch.dtype, k: int
) -> str | None:
    limits = current_limits()
    reason = None
    if not scheme.is_static_input_scheme:
        reason = limits.dynamic_quant.refusal(dtype, k)
    return reason or limits.quant_matmul.refusal(dtype, [k])


def _quantize_activations(scheme: Any, args: dict[str, Any]) -> None:
    """Replace a scheme's kernel by one that quantizes activations, if there is one."""
    weights, inputs = args["weights"], args["input_activations"]
    if inputs is None or not isinstance(scheme, _PACKED_A8_SCHEMES):
        return
    chosen = type(scheme.kernel).__name__
    scheme.kernel, reason = with_quantized_activations(scheme.kernel, inputs.symmetric)
    name = f"W{weights.num_bits}A8"
    if reason is None:
        logger.info_once(
            "Using %s for %s (%s) instead of %s, which does not quantize activations.",
            type(scheme.kernel).__name__,
            type(scheme).__name__,
            name,
            chosen,
        )
    else:
        logger.info_once(
            "%s is served as W%dA16, with unquantized activations: %s.",
            name,
            weights.num_bits,
            reason,
        )
