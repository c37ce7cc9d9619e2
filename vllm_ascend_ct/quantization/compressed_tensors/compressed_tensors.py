# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The compressed-tensors config on Ascend: upstream's, where it must differ."""

from typing import Any

import torch
from compressed_tensors.quantization import QuantizationType
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import (
    LinearBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (  # noqa: E501
    CompressedTensorsConfig,
    CompressedTensorsLinearMethod,
)
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsScheme,
    CompressedTensorsW8A8Int8,
    CompressedTensorsWNA16,
)

from vllm_ascend_ct import ascend_base
from vllm_ascend_ct.errors import UnsupportedCheckpointError
from vllm_ascend_ct.ops.limits import current_limits

logger = init_logger("vllm.ascend_ct.quantization")

_SUPPORTED_SCHEMES = (CompressedTensorsWNA16, CompressedTensorsW8A8Int8)
_SUPPORTED = (
    "linear layers with int4 or int8 weights, per channel or in groups of a multiple "
    "of 32 (pack-quantized), or with int8 weights and activations (int-quantized)"
)
_REMEDY = (
    "Quantize the model again with a supported scheme, or add the layer to `ignore`"
)


class AscendCTConfig(CompressedTensorsConfig):
    """Serves with NPU kernels, and refuses by name what they cannot serve."""

    # vllm-ascend asks these of any config (attention backends, KV connectors).
    enable_fa_quant = False
    enable_c8_quant = False
    c8_quant_layers = ()
    kvcache_quant_layers = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Each of vllm-ascend's RMSNorm layers iterates over it.
        self.quant_description: dict[str, Any] = {}
        if self.transform_config is not None and self.transform_config.config_groups:
            raise UnsupportedCheckpointError(
                "Transforms are not supported",
                where=f"transform_config={list(self.transform_config.config_groups)}",
                supported="checkpoints without transform_config",
                remedy="Quantize the model again without SpinQuant or QuIP transforms",
            )
        if self.kv_cache_scheme is not None:
            logger.warning_once(
                "The checkpoint's kv_cache_scheme is not honoured: the KV cache stays "
                "unquantized."
            )
            self.kv_cache_scheme = None

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """The dtypes a model may have; vLLM asks before it loads anything."""
        return list(current_limits().weight_quant_batchmatmul.x_dtypes)

    def get_quant_method(
        self, layer: torch.nn.Module, prefix: str, tid2eid: Any = None
    ) -> QuantizeMethodBase | None:
        """Choose the method that serves a layer.

        Args:
            layer: The layer, not yet with weights.
            prefix: Its name.
            tid2eid: What vllm-ascend passes for hash-routed experts.

        Raises:
            UnsupportedCheckpointError: The layer's scheme is not supported.

        """
        try:
            method = super().get_quant_method(layer, prefix)
        except ValueError as error:
            raise _refused(str(error), prefix) from error
        if type(method) is CompressedTensorsLinearMethod:
            return AscendCTLinearMethod(self)
        if isinstance(layer, LinearBase) and type(method) is UnquantizedLinearMethod:
            return ascend_base.unquantized_linear_method() or method
        return method

    def get_scheme(
        self, layer: torch.nn.Module, layer_name: str | None = None
    ) -> CompressedTensorsScheme | None:
        args: dict[str, Any] = self.get_scheme_dict(layer, layer_name) or {}
        for name in ("weights", "input_activations"):
            quantized = args.get(name)
            if quantized is not None and quantized.type != QuantizationType.INT:
                # Upstream would look for kernels while it constructs the scheme.
                raise _refused(f"{name} of type={quantized.type}", layer_name)
        try:
            scheme = super().get_scheme(layer, layer_name)
        except NotImplementedError as error:
            raise _refused(str(error), layer_name) from error
        if scheme is None or isinstance(scheme, _SUPPORTED_SCHEMES):
            return scheme
        raise _refused(f"{type(scheme).__name__} has no NPU kernel", layer_name)


@register_weight_loader_v2_supported_method
class AscendCTLinearMethod(CompressedTensorsLinearMethod):
    """Upstream's linear method, with what vllm-ascend's layers need besides."""

    # vllm-ascend takes a layer to be unquantized where this stays None.
    quant_method: CompressedTensorsScheme | None = None

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
        if isinstance(layer.scheme, CompressedTensorsW8A8Int8):
            # Upstream does not tell an int8 kernel the sizes.
            sizes = [input_size_per_partition, sum(output_partition_sizes)]
            if reason := current_limits().quant_matmul.refusal(params_dtype, sizes):
                raise _refused(reason, prefix)
        try:
            super().create_weights(
                layer,
                input_size_per_partition,
                output_partition_sizes,
                input_size,
                output_size,
                params_dtype,
                **extra_weight_attrs,
            )
        except ValueError as error:
            raise _refused(str(error), prefix) from error
        self.quant_method = layer.scheme
        # Upstream's layers do this in their constructors, vllm-ascend's do not.
        if isinstance(layer, LinearBase) and hasattr(layer, "tp_rank"):
            layer.update_param_tp_status()

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        try:
            super().process_weights_after_loading(layer)
        except ValueError as error:
            raise _refused(str(error), getattr(layer, "prefix", None)) from error


def _refused(what: str, layer_name: str | None) -> UnsupportedCheckpointError:
    return UnsupportedCheckpointError(
        what, where=f"layer {layer_name}", supported=_SUPPORTED, remedy=_REMEDY
    )
