# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""vllm-ascend's layers, on CPU."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tools.tiny_moe import configs


@pytest.fixture(scope="session")
def vllm_config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """An engine's config, current, and vllm-ascend's layers in vLLM's places."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.network_utils import get_open_port
    from vllm_ascend.utils import register_ascend_customop

    from tests.real_stack import custom_ops

    custom_ops.install()
    path: Path = tmp_path_factory.mktemp("model")
    configs()["qwen3-moe"].save_pretrained(path)
    arguments = EngineArgs(
        str(path),
        skip_tokenizer_init=True,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=512,
    )
    config = arguments.create_engine_config()
    with set_current_vllm_config(config):
        method = f"tcp://127.0.0.1:{get_open_port()}"
        init_distributed_environment(1, 0, method, 0, "gloo")
        initialize_model_parallel(backend="gloo")
        register_ascend_customop(config)
        yield config
