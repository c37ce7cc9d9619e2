# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""vllm-ascend's own engine, without this package: as released, and with the patches.

python -m tools.soft_npu test tests/soft_npu/test_series.py -m soft_npu -rP
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.soft_npu import engines
from tests.soft_npu.engines import EAGER, SMALL
from tools.soft_npu import environment
from tools.upstream import patch_tree
from tools.upstream.patch_series import target_of

pytestmark = [pytest.mark.soft_npu, pytest.mark.long]
NO_SCHEME = "quant_type=W4A16, layer_type=linear"
NO_TYPE = "No compressed-tensors compatible quantization type"
# What happens as released: an error, or None if it serves.
BEFORE = {
    "dense-w4a16": NO_SCHEME,
    "dense/w4a16-g128-asym": NO_SCHEME,
    "dense/w4a16-channel": NO_TYPE,
    "dense/w8a16-channel": NO_TYPE,
    "dense/w8a16-g128-asym": NO_TYPE,
    # Attention in W8A8, which is served as released, and experts in W4A16.
    "qwen3-moe/w8a8-channel-dynamic+w4a16-g128": None,
    "qwen3-moe/w8a8-channel-dynamic+w4a16-g128-asym": "zero_point",
    "qwen3-moe/w8a8-channel-dynamic+w4a16-channel": NO_TYPE,
    "moe-w4a16": NO_SCHEME,
}
Serve = Callable[..., engines.Result]


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vllm-ascend's source tree with all patches."""
    target = target_of("vllm-ascend")
    tree = tmp_path_factory.mktemp("series") / "tree"
    patch_tree.apply(target, target.base, target.patches, tree)
    return tree


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Serve:
    """Serve a checkpoint by vllm-ascend alone, with a tree before what is installed."""
    release = target_of("vllm-ascend").base
    for name, value in environment.variables(environment.Device(release)).items():
        monkeypatch.setenv(name, value)

    def get(name: str, tree: Path | None, **options: Any) -> engines.Result:
        if tree is not None:
            paths = os.environ["PYTHONPATH"]
            monkeypatch.setenv("PYTHONPATH", f"{tree}{os.pathsep}{paths}")
        memory = SMALL if engines.is_moe(name) else {}
        run = {"checkpoint": name, **EAGER, **memory, **options}
        (result,) = engines.run([run], tmp_path / "out.json", plugins="ascend")
        assert result["config"].startswith("vllm_ascend.")
        return result

    return get


@pytest.mark.parametrize("name", BEFORE)
def test_as_released(serve: Serve, name: str) -> None:
    if reason := BEFORE[name]:
        with pytest.raises(AssertionError, match=reason):
            serve(name, None)
        return
    # Three quarters of the scales are never loaded.
    found = engines.difference(name, serve(name, None)["logprobs"])
    print(f"{name} as released: {found:.4f}")
    assert not found < 1


@pytest.mark.parametrize("name", BEFORE)
def test_with_the_patches(serve: Serve, patched: Path, name: str) -> None:
    result = serve(name, patched)
    found = engines.difference(name, result["logprobs"])
    print(f"{name} with the patches: {found:.4f}")
    assert found < engines.tolerance(name)
    (rank,) = result["ranks"]
    assert rank["platform"] == "NPUPlatform"
    if engines.is_moe(name):
        assert "AscendW4A16FusedMoEMethod" in rank["methods"]
    if "w8a8" not in name:
        assert rank["kernels"] == ["AscendMPLinearKernel"]


@pytest.mark.parametrize(
    "name", ["dense-w8a8", "moe-w8a8", "qwen3-moe/w8a8-channel-dynamic+w4a16-g32"]
)
def test_what_is_served_as_released_stays(
    serve: Serve, patched: Path, name: str
) -> None:
    before, after = serve(name, None), serve(name, patched)
    assert before["logprobs"] == after["logprobs"]
    assert before["tokens"] == after["tokens"]
    assert before["ranks"] == after["ranks"]
    found = engines.difference(name, after["logprobs"])
    print(f"{name} before and after: {found:.4f}")


@pytest.mark.parametrize(
    "name", ["dense-w4a16", "qwen3-moe/w8a8-channel-dynamic+w4a16-g128"]
)
def test_graphs_say_what_eager_says(serve: Serve, patched: Path, name: str) -> None:
    eager, graphs = (
        serve(name, patched, enforce_eager=enforce) for enforce in (True, False)
    )
    assert graphs["tokens"] == eager["tokens"]
