# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Let engines of vllm-ascend sleep, and find what a sleep loses."""

import gc
from collections import defaultdict
from collections.abc import Collection
from typing import Any

import torch


def sleep(llm: Any, level: int) -> dict[str, Any]:
    """Let an engine sleep and wake up; reload weights that it has not kept.

    Returns:
        By rank: what of the weights' pool belongs to nothing that is restored after a
        sleep of level 2; bytes of the pools; bytes that are used of the device before,
        asleep and after.

    """
    found = {
        "unowned": llm.apply_model(unowned),
        "pools": llm.apply_model(pools),
        "before": llm.apply_model(used_memory),
    }
    llm.sleep(level=level)
    found["asleep"] = llm.apply_model(used_memory)
    llm.wake_up()
    found["after"] = llm.apply_model(used_memory)
    if level == 2:
        reload(llm)
    return found


def reload(llm: Any, path: str | None = None) -> None:
    """Load weights again, from the checkpoint or from another directory."""
    llm.collective_rpc(_reload, args=(path,))
    llm.reset_prefix_cache()


def _reload(worker: Any, path: str | None) -> None:
    # The worker of vllm-ascend 0.23 has no method for it.
    target = worker if hasattr(worker, "reload_weights") else worker.model_runner
    target.reload_weights(weights_path=path)


def used_memory(_: Any) -> int:
    """Bytes that are used of this process's device."""
    free, total = _npu().mem_get_info()
    return int(total - free)


def pools(_: Any) -> int:
    """Bytes of the pools that a sleep frees."""
    size: int = _allocator().get_current_usage()
    return size


def unowned(model: Any) -> list[list[str]]:
    """Memory of the weights' pool that no parameter and no buffer has.

    A sleep of level 2 discards the pool. A reload writes parameters, and vllm-ascend
    buffers. Whatever else is in it comes back as garbage, unless somebody derives it
    again.

    Returns:
        For each allocation the names that Python objects have for it.

    """
    owners = (*model.parameters(), *model.buffers())
    owned = {tensor.untyped_storage().data_ptr() for tensor in owners}
    pool = _allocator().pointer_to_data
    found = []
    for segment in _npu().memory_snapshot():
        address = segment["address"]
        if address not in pool or pool[address].tag != "weights":
            continue
        for block in segment["blocks"]:
            if block["state"] == "active_allocated" and address not in owned:
                found.append(address)
            address += block["size"]
    names = _names(found)
    return [sorted(names[address]) for address in found]


def _names(addresses: Collection[int]) -> dict[int, set[str]]:
    """Names of the attributes and variables that are tensors at some addresses."""
    # vLLM takes objects from the collector's list, and it would say nothing of them.
    gc.unfreeze()
    # Not `isinstance`: it asks weak references to what is gone, and takes the tensors
    # without memory that a compiler has.
    kinds = (torch.Tensor, torch.nn.Parameter)
    tensors = [x for x in gc.get_objects() if type(x) in kinds]
    at = {
        id(tensor): tensor.untyped_storage().data_ptr()
        for tensor in tensors
        if tensor.is_npu
    }
    held = [x for x in tensors if at.get(id(x)) in addresses]
    names = defaultdict(set)
    for holder in gc.get_referrers(*held):
        is_dict = issubclass(type(holder), dict)
        attributes = holder if is_dict else getattr(holder, "__dict__", {})
        for name, value in list(attributes.items()):
            if at.get(id(value)) in addresses:
                names[at[id(value)]].add(str(name))
    return names


def _allocator() -> Any:
    from vllm_ascend.device_allocator.camem import CaMemAllocator

    return CaMemAllocator.get_instance()


def _npu() -> Any:
    return torch.npu  # type: ignore[attr-defined]
