# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The compressed-tensors config on Ascend: upstream's, where it must differ."""

from typing import Any, cast

import torch
from compressed_tensors.quantization import QuantizationArgs
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
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

from vllm_ascend_ct import ascend_base
from vllm_ascend_ct.ops.limits import current_limits
from vllm_ascend_ct.quantization.compressed_tensors.checks import check_config
from vllm_ascend_ct.quantization.compressed_tensors.headers import CheckpointHeaders
from vllm_ascend_ct.quantization.compressed_tensors.linear_method import (
    AscendCTEmbeddingMethod,
    AscendCTHeadMethod,
    AscendCTLinearMethod,
    AscendCTUnquantizedHeadMethod,
    refused,
)
from vllm_ascend_ct.quantization.compressed_tensors.rules import refusal
from vllm_ascend_ct.quantization.compressed_tensors.schemes.compressed_tensors_wNa8o8 import (  # noqa: E501
    AscendCTWNA8O8Int,
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
        """Note the names and sizes of the checkpoint's tensors."""
        super().maybe_update_config(model_name, hf_config, revision)
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
            return self._experts_method(layer, prefix)
        try:
            method = super().get_quant_method(layer, prefix)
        except ValueError as error:
            raise refused(str(error), prefix) from error
        if type(method) is CompressedTensorsLinearMethod:
            return AscendCTLinearMethod(self, self.get_scheme_dict(layer, prefix) or {})
        if isinstance(layer, LinearBase) and type(method) is UnquantizedLinearMethod:
            return ascend_base.unquantized_linear_method() or method
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
        if not isinstance(scheme, CompressedTensorsWNA16):
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

    def _experts_method(self, layer: Any, prefix: str) -> QuantizeMethodBase | None:
        """Choose the method of routed experts."""
        self._add_fused_moe_to_target_scheme_map()
        names = [
            f"{prefix}.0.{getattr(layer, f'ckpt_{name}_name', name)}"
            for name in ("gate_proj", "up_proj", "down_proj")
        ]
        if any(self.get_scheme_dict(layer, name) for name in names):
            raise refused("Quantized routed experts are not served yet", prefix)
        return super().get_quant_method(layer, prefix)

    def get_scheme(
        self, layer: torch.nn.Module, layer_name: str | None = None
    ) -> CompressedTensorsScheme | None:
        args = self.get_scheme_dict(layer, layer_name)
        if args is None:
            return None
        if reason := refusal(args):
            # Upstream would look for kernels while it constructs the scheme.
            raise refused(reason, layer_name)
        if args.get("output_activations") is not None:
            weights = args["weights"]
            return AscendCTWNA8O8Int(
                num_bits=weights.num_bits,
                strategy=weights.strategy,
                group_size=weights.group_size,
                has_input_act=True,
                has_output_act=True,
                layer_name=layer_name,
                quant_format=args["format"],
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
            by_part = {part: _essence(find(layer, part)) for part in parts[1:]}
            first = _essence(find(layer, parts[0]))
        except ValueError as error:
            raise refused(str(error), layer_name) from error
        for part, scheme in by_part.items():
            if scheme != first:
                raise refused(
                    "Shards of one layer are quantized differently: "
                    f"{_difference(parts[0], first, scheme)}, "
                    f"{_difference(part, scheme, first)}",
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


# How the integers were found, and in which order, does not change what they mean.
_NOT_ESSENTIAL = {"observer", "observer_kwargs", "actorder"}


def _difference(
    part: str, scheme: dict[str, Any] | None, other: dict[str, Any] | None
) -> str:
    """What of a shard's scheme is not like the other's."""
    if scheme is None:
        return f"{part} not at all"
    if other is None:
        return f"{part} as {scheme['format']}"
    for kind, args in scheme.items():
        if args != other.get(kind):
            others = other.get(kind)
            if isinstance(args, dict) and isinstance(others, dict):
                args = {key: args[key] for key in args if args[key] != others[key]}
            return f"{part} {kind}={args}"
    return part


def _essence(scheme: dict[str, Any] | None) -> dict[str, Any] | None:
    """What of a scheme has to be the same for shards of one layer."""
    return scheme and {
        key: value.model_dump(exclude=_NOT_ESSENTIAL)
        if isinstance(value, QuantizationArgs)
        else value
        for key, value in scheme.items()
    }
