# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The platform for machines without an NPU."""

from typing import TYPE_CHECKING

import torch
from vllm.logger import init_logger
from vllm.platforms.cpu import CpuPlatform
from vllm.platforms.interface import PlatformEnum
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_ascend_ct import envs
from vllm_ascend_ct.errors import PlatformError, Remedy
from vllm_ascend_ct.platforms.interface import AscendCTPlatformMixin

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.ascend_ct.platforms")


class EmulatedAscendCTPlatform(AscendCTPlatformMixin, CpuPlatform):
    """vLLM's CPU platform as an out-of-tree platform, with emulated NPU operators.

    `_enum` makes upstream's kernel registries offer this package's kernels. All other
    code should take the CPU branches: if `is_out_of_tree` were true, vLLM would use a
    device "cpu:<rank>", and MoE kernels that other platforms provide.
    """

    _enum = PlatformEnum.OOT
    # CPU kernels of other methods are registered for vLLM's own CPU platform only.
    supported_quantization = ["compressed-tensors"]

    def is_cpu(self) -> bool:
        return True

    def is_out_of_tree(self) -> bool:
        return False

    @classmethod
    def verify_quantization(cls, quant: str) -> None:
        """Refuse models of other quantization methods, when a model is configured.

        Raises:
            PlatformError: The model's method is not compressed-tensors.

        """
        if quant not in cls.supported_quantization:
            raise PlatformError(
                f"The emulated platform does not support {quant} models",
                where=f"quantization={quant}",
                supported=", ".join(cls.supported_quantization) + ", or none",
                remedy=Remedy.WITHOUT_PLUGIN,
            )

    @classmethod
    def check_and_update_config(cls, vllm_config: "VllmConfig") -> None:
        _avoid_amx_mla(vllm_config)
        super().check_and_update_config(vllm_config)
        # vLLM's CPU operator rotates `[T, heads, size]` incorrectly if pairs are
        # interleaved (DeepSeek). Use the torch implementation, as compiled models do.
        compilation = vllm_config.compilation_config
        if not any(
            name.endswith("rotary_embedding") for name in compilation.custom_ops
        ):
            compilation.custom_ops.append("-rotary_embedding")
        # torch 2.13 may move a reader of a mutated argument ahead of the operator that
        # mutates it: with two ranks, DeepSeek's router ahead of its gate.
        compilation.inductor_compile_config.setdefault("reorder_for_peak_memory", False)

    @classmethod
    def prepare_ascend_ct(cls) -> None:
        from vllm_ascend_ct.ops import emulated

        emulated.install()

    @classmethod
    def announce(cls) -> None:
        super().announce()
        logger.warning_once(
            "Emulating the NPU operators on CPU: results and limits follow their "
            "documentation, but the speed says nothing about an NPU. On an NPU host, "
            "install torch_npu and vllm-ascend, or set %s=0 to fail instead of "
            "emulating.",
            envs.EMULATE,
        )


def _avoid_amx_mla(vllm_config: "VllmConfig") -> None:
    """Take vLLM's other backend of latent attention for dtypes but bfloat16.

    vLLM takes AMX_MLA on CPUs with AMX, whatever the dtype; it computes garbage with
    float16.
    """
    model = vllm_config.model_config
    if model is not None and model.use_mla and model.dtype != torch.bfloat16:
        vllm_config.attention_config.backend = AttentionBackendEnum.CPU_MLA
