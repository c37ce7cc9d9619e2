# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The compressed-tensors config on Ascend: upstream's, where it must differ."""

from typing import Any, cast

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import (
    RoutedExperts,
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (  # noqa: E501
    CompressedTensorsConfig,
    CompressedTensorsLinearMethod,
)
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsScheme,
    CompressedTensorsWNA16,
)
from vllm.model_executor.layers.quantization.compressed_tensors.transform.linear import (  # noqa: E501
    get_layer_partition_names,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.transformers_utils.config import get_safetensors_params_metadata

from vllm_ascend_ct.ascend_base import fused_moe, graph_key, linear, settings
from vllm_ascend_ct.ops.limits import current_limits
from vllm_ascend_ct.quantization.compressed_tensors.checks import check_config
from vllm_ascend_ct.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe import (  # noqa: E501
    get_moe_method,
)
from vllm_ascend_ct.quantization.compressed_tensors.compressed_tensors_moe.registered import (  # noqa: E501
    check_tensors,
    is_upstreams,
)
from vllm_ascend_ct.quantization.compressed_tensors.dequantized_linear_method import (
    AscendCTDequantizedLinearMethod,
    is_read_elsewhere,
)
from vllm_ascend_ct.quantization.compressed_tensors.headers import CheckpointHeaders
from vllm_ascend_ct.quantization.compressed_tensors.linear_method import (
    AscendCTLinearMethod,
    refused,
)
from vllm_ascend_ct.quantization.compressed_tensors.rules import refusal
from vllm_ascend_ct.quantization.compressed_tensors.schemes.compressed_tensors_wNa8o8 import (  # noqa: E501
    AscendCTWNA8O8Int,
)
from vllm_ascend_ct.quantization.compressed_tensors.schemes.compressed_tensors_wNa16 import (  # noqa: E501
    AscendCTWNA16,
)
from vllm_ascend_ct.quantization.compressed_tensors.utils import difference, essence
from vllm_ascend_ct.quantization.compressed_tensors.vocab_parallel_embedding import (
    AscendCTEmbeddingMethod,
    AscendCTHeadMethod,
    AscendCTUnquantizedHeadMethod,
)

logger = init_logger("vllm.ascend_ct.quantization")


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
        self._headers: CheckpointHeaders | None = None
        if self.kv_cache_scheme is not None:
            logger.warning_once(
                "The checkpoint's kv_cache_scheme is not honoured: the KV cache stays "
                "unquantized."
            )
            self.kv_cache_scheme = None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "AscendCTConfig":
        """Read a checkpoint's `quantization_config`.

        Raises:
            UnsupportedCheckpointError: It cannot be served as it says.

        """
        check_config(config)
        # Upstream refuses weights that are stored whole but were made sparse.
        config = {
            **config,
            "ignore": config.get("ignore") or [],
            "sparsity_config": None,
        }
        return cast(AscendCTConfig, super().from_config(config))

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """The dtypes a model may have; vLLM asks before it loads anything."""
        return list(current_limits().weight_quant_batchmatmul.x_dtypes)

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Note what decides how layers are computed, and the checkpoint's tensors."""
        super().maybe_update_config(model_name, hf_config, revision)
        if hf_config is not None:
            # vLLM names its cache of compiled graphs by the model's config, not by
            # the quantization config.
            hf_config.update(graph_key())
        try:
            headers = get_safetensors_params_metadata(model_name, revision=revision)
        except Exception as error:
            # What loads the file says better what is wrong with it.
            logger.debug("Could not read headers of %s: %s", model_name, error)
            return
        self._headers = CheckpointHeaders(headers)

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
        if isinstance(layer, VocabParallelEmbedding):
            return self._vocabulary_method(layer, prefix)
        if isinstance(layer, RoutedExperts):
            return self._experts_method(layer, prefix, tid2eid)
        try:
            method = super().get_quant_method(layer, prefix)
        except ValueError as error:
            raise refused(str(error), prefix) from error
        if type(method) is CompressedTensorsLinearMethod:
            args = self.get_scheme_dict(layer, prefix) or {}
            settings.check_linear(prefix)
            if is_read_elsewhere(prefix):
                return AscendCTDequantizedLinearMethod(self, args)
            return AscendCTLinearMethod(self, args)
        if isinstance(layer, LinearBase) and type(method) is UnquantizedLinearMethod:
            return linear.unquantized_method() or method
        return method

    def _vocabulary_method(self, layer: Any, prefix: str) -> QuantizeMethodBase | None:
        """Choose the method of an embedding or of an output head."""
        is_head = isinstance(layer, ParallelLMHead)
        scheme = self.get_scheme(layer, prefix)
        if scheme is None:
            return AscendCTUnquantizedHeadMethod() if is_head else None
        layer.scheme = scheme
        args = self.get_scheme_dict(layer, prefix) or {}
        if is_head:
            return AscendCTHeadMethod(self, args)
        weight_only = args.get("input_activations") is None
        if not weight_only or not isinstance(scheme, CompressedTensorsWNA16):
            raise refused(
                f"{type(scheme).__name__} of an embedding; supported: weight-only",
                prefix,
            )
        return AscendCTEmbeddingMethod(self, args)

    def check_bias(self, layer_name: str) -> None:
        """Refuse a layer with a bias that the checkpoint lacks.

        Raises:
            UnsupportedCheckpointError: Names the tensor.

        """
        if self._headers is not None:
            mapping = self.packed_modules_mapping
            self._headers.check_bias(get_layer_partition_names(layer_name, mapping))

    def _experts_method(
        self, layer: Any, prefix: str, tid2eid: Any
    ) -> QuantizeMethodBase | None:
        """Choose the method of routed experts."""
        self._add_fused_moe_to_target_scheme_map()
        kinds = ("gate_proj", "up_proj", "down_proj")
        shards = [getattr(layer, f"ckpt_{kind}_name", kind) for kind in kinds]
        schemes = {
            name: self.get_scheme_dict(layer, f"{prefix}.0.{name}")
            for name in dict.fromkeys(shards)
            if name is not None
        }
        scheme = schemes[shards[-1]]
        for name, other in schemes.items():
            if essence(other) != essence(scheme):
                raise refused(
                    "Projections of one expert are quantized differently: "
                    f"{difference(name, other, scheme)}, "
                    f"{difference(shards[-1], scheme, other)}",
                    prefix,
                )
        if self._headers is not None:
            experts = range(layer.global_num_experts)
            self._headers.check_experts(prefix, experts, list(schemes), scheme)
        if scheme is None:
            method = fused_moe.unquantized_method(layer.moe_config, tid2eid)
            return method or UnquantizedFusedMoEMethod(layer.moe_config)
        method = get_moe_method(scheme, layer, prefix, tid2eid)
        if self._headers is not None and is_upstreams(method):
            check_tensors(self._headers, layer, prefix, shards, scheme)
        return method

    def get_scheme(
        self, layer: torch.nn.Module, layer_name: str | None = None
    ) -> CompressedTensorsScheme | None:
        args = self.get_scheme_dict(layer, layer_name)
        if args is None:
            return None
        if reason := refusal(args):
            # Upstream would look for kernels while it constructs the scheme.
            raise refused(reason, layer_name)
        weights = args["weights"]
        if args.get("output_activations") is not None:
            return AscendCTWNA8O8Int(
                num_bits=weights.num_bits,
                strategy=weights.strategy,
                group_size=weights.group_size,
                has_input_act=True,
                has_output_act=True,
                layer_name=layer_name,
                quant_format=args["format"],
            )
        if AscendCTWNA16.is_needed(args):
            return AscendCTWNA16(
                num_bits=weights.num_bits,
                symmetric=weights.symmetric,
                strategy=weights.strategy,
                group_size=weights.group_size,
                layer_name=layer_name,
            )
        try:
            return super().get_scheme(layer, layer_name)
        except (ValueError, NotImplementedError, AssertionError) as error:
            raise refused(str(error), layer_name) from error

    def get_scheme_dict(
        self, layer: torch.nn.Module, layer_name: str | None = None
    ) -> dict[str, Any] | None:
        """Find what the config says of a layer; None if it is not quantized.

        Raises:
            UnsupportedCheckpointError: It says different things of the shards that vLLM
                fuses to this layer.

        """
        parts = get_layer_partition_names(layer_name or "", self.packed_modules_mapping)
        find = super().get_scheme_dict
        try:
            found: dict[str, Any] | None = find(layer, layer_name)
            by_part = {part: essence(find(layer, part)) for part in parts[1:]}
            first = essence(find(layer, parts[0]))
        except ValueError as error:
            raise refused(str(error), layer_name) from error
        for part, scheme in by_part.items():
            if scheme != first:
                raise refused(
                    "Shards of one layer are quantized differently: "
                    f"{difference(parts[0], first, scheme)}, "
                    f"{difference(part, scheme, first)}",
                    layer_name,
                )
        headers = self._headers
        if (
            found is None
            and isinstance(layer, ParallelLMHead)
            and headers is not None
            and headers.has_quantized(layer_name or "")
        ):
            # A class target means the checkpoint's class, and there it is a Linear.
            found = find(Linear(), layer_name)
        if headers is not None and isinstance(
            layer, LinearBase | VocabParallelEmbedding
        ):
            headers.check_layer(parts, found)
        return found


class Linear(torch.nn.Module):
    """What an output head is in a checkpoint, by its class's name."""
