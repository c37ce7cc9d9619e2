# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Ranks for a model that one process builds."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    destroy_distributed_environment,
    destroy_model_parallel,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.utils.network_utils import get_distributed_init_method, get_open_port

from vllm_ascend_ct import ascend_base


@contextmanager
def first_of_ranks(vllm_config: VllmConfig) -> Iterator[None]:
    """Make this process rank 0 of the groups that a config asks for.

    vLLM's layers read sizes and ranks from real process groups, so the other ranks are
    forked: they join the groups and wait, and end with this context or this process.

    Args:
        vllm_config: With the sizes of tensor and data parallelism.

    """
    parallel = vllm_config.parallel_config
    address = get_distributed_init_method("127.0.0.1", get_open_port())
    parallel.data_parallel_master_ip = "127.0.0.1"
    parallel.data_parallel_master_port = get_open_port()
    # As vLLM's CPU worker: what the ranks' shared memory is called.
    os.environ["VLLM_DIST_IDENT"] = str(os.getpid())
    wait_end, end = os.pipe()
    children: list[int] = []
    try:
        for rank in range(1, parallel.world_size_across_dp):
            if (child := os.fork()) == 0:
                os.close(end)
                _wait_as(rank, vllm_config, address, wait_end)
            children.append(child)
        with set_current_vllm_config(vllm_config):
            _join(0, vllm_config, address)
            yield
        os.close(end)
        _leave()
    except BaseException:
        # They may be waiting for ranks that do not come.
        for child in children:
            os.kill(child, signal.SIGKILL)
        raise
    finally:
        os.close(wait_end)
        for child in children:
            os.waitpid(child, 0)
        # vLLM's CPU ranks free it as they exit, which children do not.
        for shared in Path("/dev/shm").glob(f"{os.getpid()}-*"):
            shared.unlink(missing_ok=True)


def _wait_as(rank: int, vllm_config: VllmConfig, address: str, wait_end: int) -> None:
    """Be a rank until rank 0 closes its end of a pipe."""
    try:
        with set_current_vllm_config(vllm_config):
            _join(rank, vllm_config, address)
        os.read(wait_end, 1)
        # Shared memory goes with them.
        _leave()
    finally:
        # Neither threads nor exit handlers of the parent are this process's.
        os._exit(0)


def _join(rank: int, vllm_config: VllmConfig, address: str) -> None:
    parallel = vllm_config.parallel_config
    replica, rank = divmod(rank, parallel.world_size)
    parallel.data_parallel_rank = replica
    init_distributed_environment(
        world_size=parallel.world_size,
        rank=rank,
        local_rank=rank,
        distributed_init_method=address,
        backend="gloo",
    )
    initialize_model_parallel(parallel.tensor_parallel_size)
    ascend_base.join_groups(vllm_config)


def _leave() -> None:
    destroy_model_parallel()
    destroy_distributed_environment()
