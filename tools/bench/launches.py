# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Count the operators that a device would launch."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

# Operators that only change metadata or allocate.
_FREE = {"view", "_unsafe_view", "t", "transpose", "unsqueeze", "expand", "alias"}
_FREE |= {"slice", "empty", "empty_like", "new_empty", "unflatten"}


class Launches(TorchDispatchMode):
    """Records the operators that touch memory."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func.overloadpacket.__name__ not in _FREE:
            self.names.append(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))
