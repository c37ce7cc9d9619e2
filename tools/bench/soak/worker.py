# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""What a worker does for `tools.bench.soak`, as vLLM's `--worker-extension-cls`."""

import contextlib

import torch


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

    def soak_fault(self, faults: str) -> None:
        """Inject faults into a software NPU, as `tools.soft_npu run --fault` does."""
        torch.ops.soft_npu.set_faults(faults)

    def soak_exhaust(self) -> None:
        """Take all memory of a software NPU, also what torch has not used."""
        torch.ops.soft_npu.set_faults("allocate@1+")
        kept: list[torch.Tensor] = self.__dict__.setdefault("soak_kept", [])
        for size in (1 << 20, 1 << 16, 1 << 12, 1 << 9):
            with contextlib.suppress(torch.OutOfMemoryError):
                while True:
                    kept.append(torch.empty(size, dtype=torch.int8, device="npu"))
