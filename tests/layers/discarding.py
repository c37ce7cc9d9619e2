# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""What a sleep of level 2 does to the tensors of layers.

vLLM's allocator discards all that was allocated while a model was loaded. Workers save
and restore buffers, and a reload writes parameters.
"""

import types
from collections.abc import Iterator
from typing import Any

import torch

_GARBAGE = 0xC1
# Objects that belong to no layer.
_SHARED = (type, types.ModuleType, types.FunctionType, torch.dtype, torch.device)


def held(root: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that an object holds, and what it holds holds, with their paths."""
    seen: set[int] = set()
    waiting = [("", root)]
    while waiting:
        path, found = waiting.pop()
        if id(found) in seen or isinstance(found, _SHARED):
            continue
        seen.add(id(found))
        if isinstance(found, torch.Tensor):
            yield path, found
        if isinstance(found, dict):
            parts = found.items()
        elif isinstance(found, (list, tuple, set)):
            parts = enumerate(found)
        else:
            parts = getattr(found, "__dict__", {}).items()
        waiting += [(f"{path}.{name}", part) for name, part in parts]


def discard(model: torch.nn.Module) -> None:
    """Leave only what buffers hold; also tensors that are no parameters are lost."""
    saved = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for _, tensor in held(model):
        if not tensor.is_meta:
            memory = tensor.untyped_storage()
            torch.tensor([], dtype=torch.uint8).set_(memory).fill_(_GARBAGE)
    for name, buffer in model.named_buffers():
        buffer.copy_(saved[name])
