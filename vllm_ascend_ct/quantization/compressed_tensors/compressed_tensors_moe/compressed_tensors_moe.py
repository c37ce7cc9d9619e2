# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""What upstream's methods for experts are on Ascend."""

from typing import TYPE_CHECKING, Any

import torch
from compressed_tensors import CompressionFormat
from compressed_tensors.quantization import QuantizationArgs
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import (
    FusedMoEConfig,
    FusedMoEMethodBase,
    FusedMoEQuantConfig,
)
from vllm.model_executor.layers.fused_moe import modular_kernel as mk
from vllm.model_executor.layers.fused_moe.all2all_utils import (
    maybe_make_prepare_finalize,
)

from vllm_ascend_ct.ascend_base import serves
from vllm_ascend_ct.compat import UnfinalizedMoEOutput
from vllm_ascend_ct.fused_moe.experts.ascend_moe import AscendExperts, stored_weight
from vllm_ascend_ct.fused_moe.fused_moe_ascend_method import (
    FusedMoEAscendMethod,
    experts_classes,
)
from vllm_ascend_ct.quantization.compressed_tensors.compressed_tensors_moe.loading import (  # noqa: E501
    ExpertsLoadRecord,
    Transform,
    expert_shapes,
)
from vllm_ascend_ct.quantization.compressed_tensors.compressed_tensors_moe.registered import (  # noqa: E501
    registered_method,
)
from vllm_ascend_ct.quantization.compressed_tensors.linear_method import refused
from vllm_ascend_ct.quantization.compressed_tensors.rules import EXPERT_RULES, refusal

if TYPE_CHECKING:
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (  # noqa: E501
        CompressedTensorsMoEMethod,
    )

    _Base = CompressedTensorsMoEMethod
else:
    _Base = object

logger = init_logger("vllm.ascend_ct.quantization")

_WORD = 32


def get_moe_method(
    scheme: dict[str, Any], layer: Any, layer_name: str, tid2eid: Any
) -> FusedMoEMethodBase:
    """Choose the method that serves quantized experts.

    Args:
        scheme: As upstream's `get_scheme_dict` gives it.
        layer: The layer.
        layer_name: Its name.
        tid2eid: See `FusedMoEAscendMethod`.

    Raises:
        UnsupportedCheckpointError: None does.

    """
    from vllm_ascend_ct.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w4a8_int8,
        compressed_tensors_moe_w8a8_int8,
        compressed_tensors_moe_wna16,
    )

    if reason := refusal(scheme, EXPERT_RULES):
        raise refused(f"Experts with {reason}", layer_name)
    weights = scheme["weights"]
    method_cls: type[AscendCTMoEMixin] = (
        compressed_tensors_moe_wna16.AscendCTWNA16MoEMethod
    )
    if scheme["format"] != CompressionFormat.pack_quantized.value:
        method_cls = (
            compressed_tensors_moe_w4a8_int8.AscendCTW4A8Int8MoEMethod
            if weights.num_bits == 4
            else compressed_tensors_moe_w8a8_int8.AscendCTW8A8Int8MoEMethod
        )
    moe, inputs = layer.moe_config, scheme["input_activations"]
    experts_cls = choose_experts(weights, inputs, moe, layer_name)
    if registered := registered_method(scheme, experts_cls, layer, layer_name):
        return registered
    method = method_cls(weights, inputs, moe, experts_cls)
    return FusedMoEAscendMethod(method, layer, tid2eid) if serves() else method


def choose_experts(
    weights: QuantizationArgs,
    inputs: QuantizationArgs | None,
    moe: FusedMoEConfig,
    layer_name: str | None,
) -> type[AscendExperts]:
    """Choose what computes a layer.

    Raises:
        UnsupportedCheckpointError: Nothing does.

    """
    name = f"W{weights.num_bits}A{8 if inputs else 16}"
    if reason := _size_refusal(weights, moe):
        raise refused(f"{name} experts: {reason}", layer_name)
    group_size = max(weights.group_size or 0, 0)
    scheme = moe, weights.num_bits, group_size, weights.symmetric
    wna8, wna16 = experts_classes()
    if inputs is not None:
        reason = "asymmetric activations"
        if inputs.symmetric:
            reason = wna8.refusal(*scheme)
        if reason is None:
            logger.info_once("Using %s for %s experts.", wna8.__name__, name)
            return wna8
    if weight_reason := wna16.refusal(*scheme):
        raise refused(f"{name} experts: {weight_reason}", layer_name)
    logger.info_once("Using %s for %s experts.", wna16.__name__, name)
    if inputs is not None:
        logger.info_once(
            "%s experts are served as W%dA16, their activations unquantized: %s.",
            name,
            weights.num_bits,
            reason,
        )
    return wna16


def _size_refusal(weights: QuantizationArgs, moe: FusedMoEConfig) -> str | None:
    """Why a rank's share of the weights is not whole, or None."""
    bits, group_size = weights.num_bits, weights.group_size or -1
    shards = {
        "K": (moe.hidden_dim, moe.hidden_dim),
        "K of the second": (
            moe.intermediate_size_per_partition * moe.tp_size,
            moe.intermediate_size_per_partition,
        ),
    }
    for name, (size, part) in shards.items():
        if part < _WORD:
            return f"{name} product is {part} a rank; supported: from {_WORD}"
        if group_size > 0 and part % group_size:
            return (
                f"{name} product is {part} a rank, group_size={group_size}; "
                "supported: whole groups"
            )
        if part != size and part * bits % _WORD:
            return (
                f"{name} product is {part} of {size} a rank, weights.num_bits={bits}; "
                "supported: ranks that begin with a whole word"
            )
        if not weights.symmetric and part * bits % _WORD:
            return (
                f"N={part}, weights.num_bits={bits}, symmetric=False; "
                "supported: shards whose zero points fill whole words"
            )
    return None


class AscendCTMoEMixin(_Base):
    """Goes before an upstream method, of which it uses `create_weights`.

    Upstream's constructors look for experts among those of platforms in tree.
    """

    experts_cls: Any
    transform: Transform | None = None

    def __init__(
        self,
        weight_quant: QuantizationArgs,
        input_quant: QuantizationArgs | None,
        moe: FusedMoEConfig,
        experts_cls: type[AscendExperts],
    ) -> None:
        FusedMoEMethodBase.__init__(self, moe)
        self.weight_quant = weight_quant
        self.input_quant = input_quant
        self.num_bits = weight_quant.num_bits
        self.symmetric = weight_quant.symmetric
        self.strategy = weight_quant.strategy
        # As upstream's methods have it: -1 for one scale per channel.
        self.group_size = weight_quant.group_size or -1
        self.experts_cls = experts_cls
        self._record: ExpertsLoadRecord | None = None

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        self._record = ExpertsLoadRecord(
            layer, expert_shapes(self.weight_quant, self.moe), self.transform
        )
        loader = self._record.record(extra_weight_attrs["weight_loader"])
        super().create_weights(  # type: ignore[safe-super]
            layer,
            num_experts,
            hidden_size,
            intermediate_size_per_partition,
            params_dtype,
            **{**extra_weight_attrs, "weight_loader": loader},
        )

    def lay_out_weights(self, layer: Any) -> AscendExperts:
        """Check what was loaded, and bring it to where experts compute with it.

        Raises:
            UnsupportedCheckpointError: Something is missing.

        """
        if self._record is not None:
            self._record.check_complete()
        self.moe_quant_config = self.get_fused_moe_quant_config(layer)
        experts: AscendExperts = self.experts_cls(self.moe, self.moe_quant_config)
        experts.process_weights_after_loading(layer)
        return experts

    def process_weights_after_loading(self, layer: Any) -> None:
        experts = self.lay_out_weights(layer)
        prepare_finalize = maybe_make_prepare_finalize(
            moe=self.moe,
            quant_config=self.moe_quant_config,
            routing_tables=layer._expert_routing_tables(),
            allow_new_interface=True,
            use_monolithic=False,
        )
        assert prepare_finalize is not None
        self.moe_kernel = mk.FusedMoEKernel(prepare_finalize, experts)
        defers = getattr(self.moe_kernel, "supports_deferred_moe_finalize", bool)
        experts.defers_finalize = UnfinalizedMoEOutput is not None and defers()

    def get_fused_moe_quant_config(self, layer: torch.nn.Module) -> FusedMoEQuantConfig:
        # Scales are the layer's parameters; nothing is quantized before the experts.
        return FusedMoEQuantConfig.make(
            gemm1_alpha=getattr(layer, "swiglu_alpha", None),
            gemm1_beta=getattr(layer, "swiglu_beta", None),
            gemm1_clamp_limit=getattr(layer, "swiglu_limit", None),
        )

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
        )
        return result

    @property
    def supports_eplb(self) -> bool:
        return False
