# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from tests.evidence import Case, Evidence, collect
from tools.bench import bench_load, bench_load_experts, bench_load_model
from tools.bench.memory import TensorMemory
from tools.checkpoints.make_checkpoint import ALL_SCHEMES
from tools.docs import support_matrix
from tools.numerics.logprobs import held_out_tokens, mean_difference, reference

W4 = "w4a16-g128-asym"


def test_tensor_memory_counts_what_lives() -> None:
    source = torch.zeros(1000, dtype=torch.int32)
    held = [torch.zeros(100)]
    with TensorMemory(held) as memory:
        first = source + 1
        second = first * 2
        del second
        view = first.t()
        source.bitwise_xor_(1)
        kept = torch.empty(500)
        held.clear()
    assert (memory.peak, memory.current) == (8000, 5600)
    del first, view, kept
    assert memory.current == -400


def test_load_benchmark_counts_memory() -> None:
    """Times are noise; memory is not."""
    results = {result.route: result for result in bench_load.routes(256, 2048)}
    assert results["w8a16-g128"].peak == results["w4a16-channel"].peak == 0
    # Packed along the other axis: a copy, after which the loaded weight is freed.
    assert results["w4a16-g128"].peak < 1.5 and results["w4a16-g128"].resident < 0.1
    assert results["w4a16, unpack-transpose-pack"].peak > 8


def test_experts_are_laid_out_one_at_a_time() -> None:
    sizes = bench_load_experts.Sizes(experts=8, hidden=512, intermediate=512)
    results = {result.route: result for result in bench_load_experts.routes(sizes)}
    assert results["w4a16-g128, whole layer"].peak > 12
    # The first product has two thirds of the weights. Two copies exist for a moment if
    # it becomes wider than 3 bits, or FRACTAL_NZ.
    copied = {"w3a16-g128": 8 / 9, "w3a8-channel": 8 / 9, "w8a8-channel": 2 / 3}
    for route, result in results.items():
        if "whole layer" not in route:
            beyond = (result.peak - copied.get(route, 0)) * sizes.experts
            # One expert's packed values, and some of its rows as int8.
            assert beyond < 3, route
            assert result.resident < (0.4 if "w3" in route else 0.1), route
            assert result.launches == (4 if "4a8" in route or "3a8" in route else 5)


@pytest.mark.long
def test_loading_of_models_is_timed(tmp_path: Path) -> None:
    """Of one block each; what is written is deleted."""
    scheme = bench_load_model.SCHEMES[0]
    lines = list(bench_load_model.results([0.01], tmp_path, [scheme]))
    cells = [line.strip("| ").split(" | ") for line in lines]
    assert [row[:2] for row in cells] == [["experts", scheme], ["dense", scheme]]
    for row in cells:
        gigabytes, tensors, *_, ratio = map(float, row[2:])
        # Of 0.01 GB, or of one block if that is larger.
        assert 0.01 < gigabytes < 1 and tensors > 20 and ratio > 1
    assert not list(tmp_path.iterdir())


def test_two_commands_of_the_readme_exist() -> None:
    root = Path(__file__).parents[2]
    readme = (root / "README.md").read_text()
    for command in ("tools/demo.sh", "tools/test.sh"):
        assert f"\n    {command}\n" in readme or f"\n{command}\n" in readme
        assert (root / command).stat().st_mode & 0o111


def test_reference_is_the_libraries(checkpoint: Callable[..., Path]) -> None:
    """For the formats that it can read: not dense 3 or 5 bits, or embeddings."""
    path = checkpoint(
        {"re:.*self_attn.*_proj": "w8a8-tensor-static-asym", "Linear": W4}
    )
    model = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.float32,
        quantization_config=CompressedTensorsConfig(dequantize=True),
    )
    tokens = torch.tensor(held_out_tokens(path))
    with torch.no_grad():
        logprobs = model(tokens.unsqueeze(0)).logits[0].log_softmax(dim=-1)
    expected = logprobs[:-1].gather(1, tokens[1:, None])[:, 0].tolist()
    assert mean_difference(reference(path), expected) < 1e-6


@pytest.mark.usefixtures("single_rank")
def test_support_matrix_is_what_the_code_does() -> None:
    """If it is not: python -m tools.docs.support_matrix."""
    page = support_matrix.PAGE.read_text()
    assert support_matrix.with_table(page, support_matrix.tables()) == page
    # Or there would be none to compare.
    assert page.count(support_matrix.START) == page.count(support_matrix.END) == 1


def test_each_scheme_has_a_row() -> None:
    """But for those that the tables do not tell from others."""
    rows = {name for name, _, _ in support_matrix.ROWS}
    found = {scheme: support_matrix.row_of(scheme) for scheme in ALL_SCHEMES}
    assert {row for row in found.values() if row} == rows
    without = {scheme for scheme, row in found.items() if row is None}
    assert without == {
        *("fp8-channel-a16", "mxfp4-a16", "nvfp4-a16"),
        *("w4a8-channel-asym-inputs", "w4a8-g64-asym-packed"),
    }


def test_evidence_is_what_tests_serve() -> None:
    """Of what makes it: one case of each kind, and one that no test has."""
    found = collect()
    assert found[Case("A2", "w4a16-g128", False)] is Evidence.SOFTWARE_NPU
    assert found[Case("A3", "w4a8-channel", True)] is Evidence.SOFTWARE_NPU
    assert found[Case("A5", "w4a8-channel", False)] is Evidence.EMULATED
    assert found[Case("A5", "w8a8-g128-packed", True)] is Evidence.UNTESTED
    assert Evidence.CHIP not in found.values()
