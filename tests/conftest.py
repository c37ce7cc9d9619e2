# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
import gc
import os

# Set before anything imports vLLM, which then selects the platform of this process.
os.environ["VLLM_PLUGINS"] = "ascend_ct"
# `tools.stacks.real_stack` sets it to use vllm-ascend's platform with emulated
# operators.
os.environ["VLLM_ASCEND_CT_EMULATE"] = os.environ.get("REAL_STACK_EMULATE", "1")
os.environ.pop("VLLM_ASCEND_CT_SOC", None)
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
# Several processes run tests in parallel.
os.environ["OMP_NUM_THREADS"] = "1"

from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

# What takes seconds to import is imported by workers only, not by xdist's controller.


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    """Skip tests of what this vLLM lacks, if they are refused for that reason."""
    from tests import lacks
    from vllm_ascend_ct.errors import UnsupportedCheckpointError

    try:
        return (yield)
    except UnsupportedCheckpointError as error:
        lacks.skip_if_named(error)
        raise


@pytest.fixture(scope="session", autouse=True)
def platform() -> None:
    """Without this check, vLLM's own CPU kernels could make all tests pass."""
    if chip := os.environ.get("REAL_STACK_CHIP"):
        from tests.real_stack.chip import set_chip

        set_chip(chip)
    from vllm.platforms import current_platform
    from vllm.plugins import load_general_plugins

    from vllm_ascend_ct.ops import emulated

    base = "NPU" if os.environ["VLLM_ASCEND_CT_EMULATE"] == "0" else "Emulated"
    assert type(current_platform).__name__ == f"{base}AscendCTPlatform"
    load_general_plugins()
    emulated.install()
    if base == "NPU":
        # vllm-ascend's platform does the same for an engine.
        from vllm.config import VllmConfig
        from vllm_ascend.ascend_config import init_ascend_config

        init_ascend_config(VllmConfig())
    if os.environ.get("REAL_STACK_EMULATE") == "0":
        from tests.real_stack import custom_ops

        # vllm-ascend registers it for devices only.
        custom_ops.install_quantize()


@pytest.fixture(scope="module", autouse=True)
def frozen(platform: None) -> Iterator[None]:
    freeze()
    yield
    gc.unfreeze()


def freeze() -> None:
    """Exempt what is alive from garbage collection, until vLLM ends an engine.

    vLLM collects garbage several times for each model that it loads and each engine
    that it starts: it would search a million objects of imported modules.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make a checkpoint from a recipe, once per session."""
    from tools.checkpoints import make_checkpoint

    directory = tmp_path_factory.mktemp("checkpoints")
    known: dict[str, Path] = {}

    def make(recipe: dict[str, str], **options: Any) -> Path:
        key = f"{recipe} {options}"
        if key not in known:
            known[key] = directory / str(len(known))
            make_checkpoint.make(known[key], recipe, **options)
        return known[key]

    return make


@pytest.fixture(scope="session")
def moe_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Make a model of `tools.checkpoints.tiny_moe`, once per session."""
    from tools.checkpoints import tiny_moe

    directory = tmp_path_factory.mktemp("moe-models")

    def make(name: str) -> Path:
        if not (directory / name).exists():
            tiny_moe.make(directory / name, name)
        return directory / name

    return make


@pytest.fixture(scope="module")
def single_rank() -> Iterator[None]:
    """Set up vLLM's parallel state with one rank, so that its layers can be built."""
    from vllm.utils.network_utils import get_open_port

    from tools.stacks.ranks import tensor_parallel

    with tensor_parallel(rank=0, world_size=1, port=get_open_port()):
        yield


@pytest.fixture(autouse=True)
def seed() -> None:
    import torch

    torch.manual_seed(0)
    # vLLM 0.23 does not reset it if a layer is refused.
    torch.set_default_dtype(torch.float32)
