# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Tests that run on software NPUs.

python -m tools.soft_npu test
"""

import json
import os
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch

from tests.soft_npu import engines

# They import torch_npu, which the usual environment lacks.
collect_ignore_glob = [] if os.environ.get("SOFT_NPU_LIBRARY") else ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def software_npu(platform: None) -> None:
    """Without this check, tests could pass on something else."""
    assert os.environ.get("SOFT_NPU_LIBRARY"), "start by `tools.soft_npu test`"
    import torch_npu

    assert torch_npu.npu.is_available() and hasattr(torch.ops.soft_npu, "memory")


@pytest.fixture(autouse=True)
def default_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    """vllm-ascend's platform sets what its engines that sleep cannot have."""
    monkeypatch.delenv("PYTORCH_NPU_ALLOC_CONF", raising=False)


@pytest.fixture(autouse=True)
def no_faults() -> Iterator[None]:
    """A fault that one test injects must not fail another."""
    yield
    torch.ops.soft_npu.set_faults("")


@pytest.fixture
def internal_format() -> Iterator[None]:
    """Enable casts to FRACTAL_NZ, like vllm-ascend's runner."""
    import torch_npu

    torch_npu.npu.config.allow_internal_format = True
    yield
    torch_npu.npu.config.allow_internal_format = False


@pytest.fixture(scope="session")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`engines.run`, once for the same runs; a failure is raised again."""
    directory = tmp_path_factory.mktemp("engines")

    @cache
    def once(key: str) -> list[engines.Result] | BaseException:
        out = directory / f"{once.cache_info().misses}.json"
        runs, options = json.loads(key)
        try:
            return engines.run(runs, out, **options)
        except BaseException as error:
            return error

    def get(runs: list[engines.Run], **options: Any) -> list[engines.Result]:
        results = once(json.dumps((runs, options)))
        if isinstance(results, BaseException):
            raise results
        return results

    return get
