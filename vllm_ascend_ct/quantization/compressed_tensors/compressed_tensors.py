# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Upstream's compressed-tensors config, with the changes that Ascend needs."""

from typing import Any, cast

import torch
from compressed_tensors.quantization import QuantizationType
from vllm.config import get_current_vllm_config, get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
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
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.utils import WeightsMapper

from vllm_ascend_ct import compat
from vllm_ascend_ct.ascend_base import (
    fused_moe,
    graph_key,
    kv_cache,
    linear,
    settings,
)
from vllm_ascend_ct.errors import Remedy, UnsupportedCheckpointError
from vllm_ascend_ct.ops.limits import current_limits
from vllm_ascend_ct.quantization.compressed_tensors import agreement
from vllm_ascend_ct.quantization.compressed_tensors.checkpoint import Checkpoint
from vllm_ascend_ct.quantization.compressed_tensors.checks import check_config
from vllm_ascend_ct.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe import (  # noqa: E501
    get_moe_method,
)
from vllm_ascend_ct.quantization.compressed_tensors.dequantized_linear_method import (
    AscendCTDequantizedLinearMethod,
    needs_dense_weight,
)
from vllm_ascend_ct.quantization.compressed_tensors.headers import LayerFiles
from vllm_ascend_ct.quantization.compressed_tensors.kv_cache import (
    NO_SCALES,
    SCALE_NAMES,
    Int8KVCacheMethod,
    is_int8,
)
from vllm_ascend_ct.quantization.compressed_tensors.linear_method import (
    AscendCTLinearMethod,
)
from vllm_ascend_ct.quantization.compressed_tensors.refusals import refused
from vllm_ascend_ct.quantization.compressed_tensors.resolved import (
    ResolvedHeadMixin,
    ResolvedLinearMixin,
)
from vllm_ascend_ct.quantization.compressed_tensors.resolving import (
    check_resolving,
    is_resolved,
)
from vllm_ascend_ct.quantization.compressed_tensors.rules import (
    is_multiplied,
    refusal,
)
from vllm_ascend_ct.quantization.compressed_tensors.schemes.compressed_tensors_w8a8_fp8 import (  # noqa: E501
    AscendCTW8A8Fp8,
)
from vllm_ascend_ct.quantization.compressed_tensors.schemes.compressed_tensors_wNa8o8 import (  # noqa: E501
    AscendCTWNA8O8Int,
)
from vllm_ascend_ct.quantization.compressed_tensors.schemes.compressed_tensors_wNa16 import (  # noqa: E501
    AscendCTWNA16,
)
from vllm_ascend_ct.quantization.compressed_tensors.unquantized import watched
from vllm_ascend_ct.quantization.compressed_tensors.utils import (
    is_float,
    is_packed,
    text,
)
from vllm_ascend_ct.quantization.compressed_tensors.vocab_parallel_embedding import (
    AscendCTEmbeddingMethod,
    AscendCTHeadMethod,
    AscendCTUnquantizedHeadMethod,
)

logger = init_logger("vllm.ascend_ct.quantization")


def _warn_of_kv_cache(reason: str) -> None:
    logger.warning_once(
        "The checkpoint's kv_cache_scheme is ignored, and the KV cache stays "
        "unquantized: %s.",
        reason,
    )


class AscendCTConfig(CompressedTensorsConfig):
    """Chooses methods that use NPU kernels, and refuses what they do not support."""

    # vllm-ascend reads these of any config (attention backends, KV connectors).
    enable_fa_quant = False
    c8_quant_layers = ()
    kvcache_quant_layers = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if not args and not kwargs:
            # vLLM does this if config.json has no quantization_config.
            raise UnsupportedCheckpointError(
                "The model is not quantized by compressed-tensors",
                where="--quantization compressed-tensors, config.json without "
                "quantization_config",
                supported="checkpoints with a quantization_config in config.json",
                remedy=Remedy.NO_QUANTIZATION,
            )
        super().__init__(*args, **kwargs)
        # Each of vllm-ascend's RMSNorm layers iterates over it.
        self.quant_description: dict[str, Any] = {}
        self.checkpoint = Checkpoint(self)
        self._quantizes_kv_cache = False
        scheme = self.kv_cache_scheme
        self.int8_kv_cache = scheme if is_int8(scheme) else None
        if scheme and not self.int8_kv_cache:
            _warn_of_kv_cache("only static symmetric int8 can be used")
        # With it, vLLM would select an FP8 cache.
        self.kv_cache_scheme = None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "AscendCTConfig":
        """Read a checkpoint's `quantization_config`.

        Raises:
            UnsupportedCheckpointError: Some field is invalid or not supported.

        """
        check_config(config)
        # Upstream refuses dense weights that have a sparsity_config.
        changed = {
            **config,
            "ignore": config.get("ignore") or [],
            "sparsity_config": None,
        }
        return cast(AscendCTConfig, super().from_config(changed))

    @property
    def enable_c8_quant(self) -> bool:
        """Whether vllm-ascend stores the KV cache of the current engine in int8.

        Its attention backend reads this when a layer is built.
        """
        config = get_current_vllm_config_or_none()
        if not self.int8_kv_cache or config is None or config.model_config is None:
            return False
        return kv_cache.refusal(config) is None

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Supported dtypes of a model. vLLM checks them before it loads anything."""
        return list(current_limits().weight_quant_batchmatmul.x_dtypes)

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Add the chip and layouts to the model's config, and set the checkpoint.

        Args:
            model_name: Directory, or name on the Hugging Face Hub.
            hf_config: The model's config.
            revision: Revision on the Hub.

        """
        super().maybe_update_config(model_name, hf_config, revision)
        if hf_config is not None:
            # The key of vLLM's cache of compiled graphs includes the model's config,
            # but not the quantization config.
            hf_config.update(graph_key())
        self.checkpoint.set_source(model_name, revision)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Map names from the checkpoint's to vLLM's."""
        super().apply_vllm_mapper(hf_to_vllm_mapper)
        self.checkpoint.add_mapper(hf_to_vllm_mapper)

    def get_cache_scale_mapper(self) -> WeightsMapper:  # type: ignore[override]
        """Map names of KV cache scales; vLLM calls this before it loads weights."""
        self.checkpoint.before_loading()
        mapper: WeightsMapper | None = super().get_cache_scale_mapper()
        mapper = mapper or WeightsMapper()
        return mapper | (SCALE_NAMES if self._quantizes_kv_cache else NO_SCALES)

    def get_quant_method(
        self, layer: torch.nn.Module, prefix: str, tid2eid: Any = None
    ) -> QuantizeMethodBase | None:
        """Choose the method of a layer.

        Args:
            layer: The layer, which has no weights yet.
            prefix: Its name.
            tid2eid: Table from token ids to experts, which vllm-ascend passes for
                experts that are routed by hash.

        Raises:
            UnsupportedCheckpointError: The layer's scheme is not supported.

        """
        if isinstance(layer, VocabParallelEmbedding):
            return self._vocabulary_method(layer, prefix)
        if isinstance(layer, RoutedExperts):
            if fused_moe.has_parameters(layer):
                # The method knows what its parameters were loaded with.
                known: Any = layer.quant_method
                known.tid2eid = tid2eid
                return layer.quant_method
            self._add_fused_moe_to_target_scheme_map()
            return get_moe_method(self, layer, prefix, tid2eid)
        if isinstance(layer, Attention):
            return self._kv_cache_method(layer, prefix)
        if not isinstance(layer, LinearBase):
            return super().get_quant_method(layer, prefix)
        args = self.get_scheme_dict(layer, prefix)
        files = self.checkpoint.check_layer(layer, prefix, args)
        if args is not None and is_resolved(args, prefix, layer):
            method_class = linear.unquantized_class() or UnquantizedLinearMethod
            made = watched(method_class, ResolvedLinearMixin)()
            return self._resolved(made, args, prefix, files)
        try:
            method = super().get_quant_method(layer, prefix)
        except ValueError as error:
            raise refused(str(error), prefix) from error
        if type(method) is UnquantizedLinearMethod:
            unquantized = watched(linear.unquantized_class() or type(method))()
            method = unquantized.watch(self.checkpoint, prefix, files)
            return method
        if type(method) is CompressedTensorsLinearMethod and args is not None:
            settings.check_linear(prefix)
            self._check_latent_query(layer, prefix, args)
            if needs_dense_weight(prefix):
                return AscendCTDequantizedLinearMethod(self, args)
            return AscendCTLinearMethod(self, args)
        return method

    def _kv_cache_method(
        self, layer: Attention, prefix: str
    ) -> QuantizeMethodBase | None:
        """The method of an attention layer; None if its cache stays unquantized.

        Upstream's would load scales, which vllm-ascend refuses with such a cache. vLLM
        asks again after loading.
        """
        known = getattr(layer, "quant_method", None)
        if not self.int8_kv_cache or isinstance(known, Int8KVCacheMethod):
            return known
        if reason := kv_cache.refusal(get_current_vllm_config()):
            _warn_of_kv_cache(reason)
            return None
        self._quantizes_kv_cache = True
        return Int8KVCacheMethod(self, prefix, self.int8_kv_cache["strategy"])

    def _resolved(
        self,
        method: ResolvedLinearMixin,
        args: dict[str, Any],
        prefix: str,
        files: LayerFiles,
    ) -> QuantizeMethodBase:
        """Set up a method that resolves its weight to 16 bits.

        Args:
            method: The method.
            args: The layer's scheme.
            prefix: Its name.
            files: The layer's tensors in the files.

        Raises:
            UnsupportedCheckpointError: The scheme is not supported, or resolving is not
                allowed.

        """
        if reason := refusal(args):
            raise refused(reason, prefix)
        check_resolving(args, prefix, self.checkpoint)
        return method.watch(self.checkpoint, prefix, files).resolve(args)

    def _check_latent_query(
        self, layer: torch.nn.Module, prefix: str, args: dict[str, Any]
    ) -> None:
        """Check a query projection; vllm-ascend judges it by another layer's scheme."""
        attention, _, name = prefix.rpartition(".")
        if name in ("q_b_proj", "wq_b"):
            other = f"{attention.removesuffix('.indexer')}.fused_qkv_a_proj"
            scheme = self.get_scheme_dict(layer, other)
            is_mixed = scheme is None or is_resolved(scheme, other)
            settings.check_latent_query(prefix, is_mixed, is_packed(args))

    def _vocabulary_method(self, layer: Any, prefix: str) -> QuantizeMethodBase | None:
        """Choose the method of an embedding or an output head."""
        is_head = isinstance(layer, ParallelLMHead)
        args = self.get_scheme_dict(layer, prefix)
        files = self.checkpoint.check_layer(layer, prefix, args)
        if args is None:
            return AscendCTUnquantizedHeadMethod() if is_head else None
        if is_float(args):
            made = (
                watched(AscendCTUnquantizedHeadMethod, ResolvedHeadMixin)()
                if is_head
                else watched(UnquantizedEmbeddingMethod, ResolvedLinearMixin)()
            )
            return self._resolved(made, args, prefix, files)
        scheme = layer.scheme = self.get_scheme(layer, prefix)
        if is_head:
            return AscendCTHeadMethod(self, args, prefix)
        weight_only = args.get("input_activations") is None
        if not weight_only or not isinstance(scheme, CompressedTensorsWNA16):
            raise refused(
                f"{type(scheme).__name__} of an embedding; supported: weight-only "
                "integers",
                prefix,
            )
        return AscendCTEmbeddingMethod(self, args)

    def get_scheme(
        self, layer: torch.nn.Module, layer_name: str | None = None
    ) -> CompressedTensorsScheme | None:
        args = self.get_scheme_dict(layer, layer_name)
        if args is None:
            return None
        if reason := refusal(args):
            # Refuse first, because upstream selects a kernel while it constructs the
            # scheme.
            raise refused(reason, layer_name)
        weights = args["weights"]
        is_mx = text(weights.strategy) == "group"
        if is_float(args) and is_multiplied(args) and not is_mx:
            return AscendCTW8A8Fp8(weights)
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
        if not compat.ZERO_POINTS_BESIDE_INT8 and _has_zero_points_beside_int8(args):
            raise refused(
                "Zero points of packed weights with 8-bit activations, for which this "
                "vLLM release has no parameters",
                layer_name,
                Remedy.QUANTIZE_AGAIN,
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
        """Find a layer's scheme in the config; None if the layer is not quantized.

        Args:
            layer: The layer, which targets may name by its class.
            layer_name: Its name, which targets and `ignore` may name.

        Raises:
            UnsupportedCheckpointError: The config has different schemes for the shards
                that vLLM fuses into this layer.

        """
        parts = get_layer_partition_names(layer_name or "", self.packed_modules_mapping)
        find = super().get_scheme_dict
        headers = self.checkpoint.headers
        try:
            schemes = {part: find(layer, part) for part in parts}
            agreement.check_one_scheme(
                "Shards of one layer", layer_name or "", schemes, self.ignore, headers
            )
            found: dict[str, Any] | None = find(layer, layer_name)
        except ValueError as error:
            raise refused(str(error), layer_name, Remedy.ONE_SCHEME) from error
        if (
            found is None
            and isinstance(layer, ParallelLMHead)
            and headers is not None
            and headers.has_quantized(layer_name or "")
        ):
            # The target `Linear` means the class in the checkpoint's model, where the
            # head is a Linear.
            found = find(Linear(), layer_name)
        return found and _without_float_inputs(found)


def _without_float_inputs(scheme: dict[str, Any]) -> dict[str, Any]:
    """Remove FP8 input quantization from a scheme with packed integer weights.

    No operator multiplies FP8 by integers, so the layer is served as weight-only.
    """
    inputs = scheme["input_activations"]
    if inputs is None or is_float(scheme) or not is_packed(scheme):
        return scheme
    if inputs.type != QuantizationType.FLOAT or not inputs.dynamic:
        return scheme
    bits = scheme["weights"].num_bits
    logger.info_once(
        "W%dA8 with FP8 activations is served as W%dA16, with unquantized activations.",
        bits,
        bits,
    )
    return {**scheme, "input_activations": None}


def _has_zero_points_beside_int8(args: dict[str, Any]) -> bool:
    return (
        is_packed(args)
        and args["input_activations"] is not None
        and not args["weights"].symmetric
    )


class Linear(torch.nn.Module):
    """Stand-in that lets the class target `Linear` match an output head."""
