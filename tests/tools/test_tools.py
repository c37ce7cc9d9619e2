# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
from pathlib import Path

import torch

from tools import bench_load
from tools.memory import TensorMemory


def test_tensor_memory_counts_what_lives() -> None:
    source = torch.zeros(1000, dtype=torch.int32)
    with TensorMemory() as memory:
        first = source + 1
        second = first * 2
        del second
        view = first.t()
        source.bitwise_xor_(1)
        kept = torch.empty(500)
    assert (memory.peak, memory.current) == (8000, 6000)
    del first, view, kept
    assert memory.current == 0


def test_load_benchmark_counts_memory() -> None:
    """Times are noise; memory is not."""
    results = {result.route: result for result in bench_load.routes(256, 128)}
    assert results["w4a16-g128"].peak == results["w8a16-g128"].peak == 0
    assert results["w4a16, unpack-transpose-pack"].peak > 8


def test_two_commands_of_the_readme_exist() -> None:
    root = Path(__file__).parents[2]
    readme = (root / "README.md").read_text()
    for command in ("tools/demo.sh", "tools/test.sh"):
        assert f"\n    {command}\n" in readme or f"\n{command}\n" in readme
        assert (root / command).stat().st_mode & 0o111
