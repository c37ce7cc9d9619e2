# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""vllm-ascend's layers, on CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from pytest_mock import MockerFixture
from vllm.config import set_current_vllm_config
from vllm.distributed import (
    cleanup_dist_env_and_memory,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins
from vllm_ascend.ascend_config import get_ascend_config
from vllm_ascend.utils import is_310p, register_ascend_customop

from tests.real_stack import custom_ops
from vllm_ascend_ct.ops import emulated


def set_setting(mocker: MockerFixture, path: str, value: Any) -> None:
    """Change a setting of vllm-ascend, by its path."""
    target: Any = get_ascend_config()
    *parents, name = path.split(".")
    for parent in parents:
        target = getattr(target, parent)
    mocker.patch.object(target, name, value)


@contextmanager
def ascend_layers(
    model: Path, rank: int, world_size: int, port: int, **options: Any
) -> Iterator[Any]:
    """Replace vLLM's layers by vllm-ascend's, within an engine's config."""
    load_general_plugins()
    emulated.install()
    custom_ops.install()
    arguments = EngineArgs(
        str(model),
        skip_tokenizer_init=True,
        dtype="float16" if is_310p() else "bfloat16",
        enforce_eager=True,
        max_model_len=512,
        tensor_parallel_size=world_size,
        **options,
    )
    config = arguments.create_engine_config()
    with (
        set_current_vllm_config(config),
        # vllm-ascend's communicator needs it, and there is none.
        patch("torch.npu.current_device", return_value=torch.device("cpu")),
    ):
        method = f"tcp://127.0.0.1:{port}"
        init_distributed_environment(world_size, rank, method, rank, "gloo")
        initialize_model_parallel(world_size, backend="gloo")
        register_ascend_customop(config)
        yield config
    cleanup_dist_env_and_memory()
