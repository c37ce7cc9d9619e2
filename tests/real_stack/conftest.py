# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""vllm-ascend's layers, on CPU."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tools.checkpoints.tiny_moe import configs

# It imports vllm-ascend, which is not in the usual environment.
_HAS_VLLM_ASCEND = importlib.util.find_spec("vllm_ascend") is not None
collect_ignore = [] if _HAS_VLLM_ASCEND else ["test_modelslim_bridge.py"]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the config of a model."""
    path: Path = tmp_path_factory.mktemp("model")
    configs()["qwen3-moe"].save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def vllm_config(model: Path) -> Iterator[Any]:
    """An engine's config, set as the current one, with vllm-ascend's layers."""
    from vllm.utils.network_utils import get_open_port

    from tests.real_stack.ascend_layers import ascend_layers

    with ascend_layers(model, rank=0, world_size=1, port=get_open_port()) as config:
        yield config
