# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""What a worker does for `tools.bench.soak`, as vLLM's `--worker-extension-cls`."""

import torch

MIB = 1 << 20


class SoakWorker:
    """Methods that vLLM adds to its worker."""

    def soak_device_memory(self) -> list[int]:
        """Bytes of the device that are used, and those of tensors; none on CPU."""
        if not hasattr(torch.ops.soft_npu, "memory"):
            return []
        import torch_npu

        device = torch_npu.npu.current_device()
        used: int = torch.ops.soft_npu.memory(device)[1]
        return [used, torch_npu.npu.memory_allocated()]

    def soak_leak(self, kib: str) -> None:
        """Keep memory, to show that it is found."""
        kept: list[torch.Tensor] = self.__dict__.setdefault("soak_kept", [])
        device = next(self.model_runner.model.parameters()).device  # type: ignore
        # Written, since memory that nobody has touched is not resident.
        kept.append(torch.ones(int(kib) << 10, dtype=torch.int8, device=device))
