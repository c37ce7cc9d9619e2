# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Set up vLLM's parallel state, to build parallel layers without an engine."""

from collections.abc import Iterator
from contextlib import contextmanager

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    cleanup_dist_env_and_memory,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.utils.network_utils import get_distributed_init_method


@contextmanager
def tensor_parallel(rank: int, world_size: int, port: int) -> Iterator[None]:
    """Join a group of ranks in which vLLM's parallel layers can be built.

    Args:
        rank: Number of this rank.
        world_size: Number of ranks.
        port: TCP port on which the ranks meet.

    """
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(
            world_size=world_size,
            rank=rank,
            local_rank=rank,
            distributed_init_method=get_distributed_init_method("127.0.0.1", port),
            backend="gloo",
        )
        initialize_model_parallel(tensor_model_parallel_size=world_size)
        yield
    cleanup_dist_env_and_memory()
