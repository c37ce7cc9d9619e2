# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Base of the methods that create, check and repack the weights of experts."""

from typing import TYPE_CHECKING, Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from vllm.model_executor.layers.fused_moe import FusedMoEConfig, FusedMoEMethodBase

from vllm_ascend_ct.errors import Remedy
from vllm_ascend_ct.fused_moe.experts.ascend_moe import AscendExperts
from vllm_ascend_ct.quantization.compressed_tensors import load_formats
from vllm_ascend_ct.quantization.compressed_tensors.checkpoint import Checkpoint
from vllm_ascend_ct.quantization.compressed_tensors.compressed_tensors_moe.loading import (  # noqa: E501
    ExpertsLoadRecord,
    Transform,
    expert_shapes,
)
from vllm_ascend_ct.quantization.compressed_tensors.headers import LayerFiles
from vllm_ascend_ct.quantization.compressed_tensors.refusals import (
    enough_memory,
    refused,
)

if TYPE_CHECKING:
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (  # noqa: E501
        CompressedTensorsMoEMethod,
    )

    _Base = CompressedTensorsMoEMethod
else:
    _Base = object


class AscendCTMoEMixin(_Base):
    """Mixin before an upstream method, of which it keeps only `create_weights`.

    Upstream's constructors would select kernels of in-tree platforms. The method that
    runs the layer, from `fused_moe/fused_moe_ascend_method.py`, wraps this one.
    """

    experts_cls: Any
    transform: Transform | None = None

    def __init__(
        self,
        weight_quant: QuantizationArgs,
        input_quant: QuantizationArgs | None,
        moe: FusedMoEConfig,
        experts_cls: type[AscendExperts],
        checkpoint: Checkpoint,
        files: LayerFiles,
    ) -> None:
        FusedMoEMethodBase.__init__(self, moe)
        self._checkpoint = checkpoint
        self._files = files
        self.weight_quant = weight_quant
        self.input_quant = input_quant
        self.num_bits = weight_quant.num_bits
        self.symmetric = weight_quant.symmetric
        self.strategy = weight_quant.strategy
        # Upstream's convention: -1 for per-channel scales.
        self.group_size = weight_quant.group_size or -1
        self.experts_cls = experts_cls
        self._record: ExpertsLoadRecord | None = None
        self._saving: Any = None

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
            layer,
            expert_shapes(self.weight_quant, self.moe),
            self._checkpoint.before_loading,
            self._files,
            self.transform,
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
        if self.moe.has_bias and not hasattr(layer, "w13_bias"):
            # vLLM 0.30 has none, and its loader then silently skips the biases.
            raise refused(
                "Biases of experts, for which this vLLM release has no parameters",
                str(layer.layer_name),
                Remedy.QUANTIZE_AGAIN,
            )
        load_formats.mark_scales(layer)

    def lay_out_weights(self, layer: Any, **options: Any) -> AscendExperts:
        """Check that a layer was loaded completely, and repack its weights.

        Args:
            layer: The loaded layer.
            options: Further arguments of `AscendExperts`.

        Returns:
            The repacked experts.

        Raises:
            UnsupportedCheckpointError: A tensor is missing.

        """
        self.check_loaded(layer)
        experts: AscendExperts = self.experts_cls(layer, self.moe, **options)
        with enough_memory(layer.layer_name):
            experts.lay_out()
        return experts

    def check_loaded(self, layer: Any) -> None:
        """Refuse experts with missing tensors, and refuse to save them from now on."""
        self._checkpoint.after_loading()
        if self._record is not None:
            if self._record.is_dummy:
                load_formats.make_dummy(layer, self.num_bits)
            else:
                self._record.check_complete()
            self._files = self._record.files = LayerFiles()
        self._saving = self._saving or load_formats.refuse_saving(layer)
