# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Graphs replay on the same memory; what cannot be captured is refused."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_npu

from vllm_ascend_ct.kernels import embedding
from vllm_ascend_ct.kernels.linear import functional

pytestmark = pytest.mark.soft_npu


def captured(function: Callable[[], torch.Tensor]) -> tuple[Any, torch.Tensor]:
    graph = torch_npu.npu.NPUGraph()
    with torch_npu.npu.graph(graph):
        result = function()
    return graph, result


def test_replay_computes_anew() -> None:
    x = torch.ones(4, device="npu")
    graph, y = captured(lambda: (x * 2 + 1).relu())
    assert y.isnan().all(), "a capture computes nothing"
    graph.replay()
    assert y.tolist() == [3, 3, 3, 3]
    x.fill_(-5)
    graph.replay()
    assert y.tolist() == [0, 0, 0, 0]


def test_in_place_and_views() -> None:
    x, total = torch.ones(2, 3, device="npu"), torch.zeros(3, 2, device="npu")

    def function() -> torch.Tensor:
        total.add_(x.t())
        return total[1:].reshape(-1)

    graph, y = captured(function)
    total.zero_()
    for count in (1, 2):
        graph.replay()
        assert torch.equal(total.cpu(), torch.full((3, 2), float(count)))
        assert y.tolist() == [count] * 4


def on_npu(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    if dtype.is_floating_point:
        return (torch.rand(sizes) + 0.1).to(dtype).npu()
    limits = torch.iinfo(dtype)
    values = torch.randint(limits.min, limits.max, sizes, dtype=torch.int64)
    return values.to(dtype).npu()


def table_look_up() -> Callable[[], torch.Tensor]:
    """Look-ups in an int4 embedding."""
    ids = torch.tensor([3, 0, 31]).npu()
    weight, scale = on_npu(32, 8, dtype=torch.int32).t(), on_npu(32, 2).t()
    return lambda: embedding.dequantized_rows(ids, weight, scale, scale)


def int4_weights() -> Callable[[], torch.Tensor]:
    x, weight, scale = on_npu(3, 64), on_npu(64, 4, dtype=torch.int32), on_npu(2, 32)
    return lambda: functional.weight_quant_matmul(x, weight, scale, group_size=32)


def int8_activations() -> Callable[[], torch.Tensor]:
    x, weight = on_npu(3, 64), on_npu(64, 32, dtype=torch.int8)
    scale = on_npu(32, dtype=torch.float32)
    return lambda: functional.dynamic_quant_matmul(x, weight, scale)


def asymmetric_activations() -> Callable[[], torch.Tensor]:
    x, weight = on_npu(3, 64), on_npu(64, 32, dtype=torch.int8)
    scale, sums = (on_npu(32, dtype=torch.float32) for _ in range(2))
    return lambda: functional.dynamic_asymmetric_quant_matmul(x, weight, scale, sums)


@pytest.mark.parametrize(
    "make", [table_look_up, int4_weights, int8_activations, asymmetric_activations]
)
def test_our_functions_are_captured(make: Callable[[], Any]) -> None:
    """None of them copies, synchronizes or allocates outside of the graph."""
    torch.manual_seed(0)
    function = make()
    expected = function()
    graph, y = captured(function)
    graph.replay()
    assert torch.equal(y.cpu(), expected.cpu())


def test_stream_that_joins_is_captured() -> None:
    side = torch_npu.npu.Stream()
    x = torch.ones(2, device="npu")

    def function() -> torch.Tensor:
        side.wait_stream(torch_npu.npu.current_stream())
        with torch_npu.npu.stream(side):
            y = x + 1
        torch_npu.npu.current_stream().wait_stream(side)
        return y * 2

    graph, y = captured(function)
    x.fill_(4)
    graph.replay()
    assert y.tolist() == [10, 10]


def test_pinned_copies_are_captured() -> None:
    host = torch.ones(3).pin_memory()
    back = torch.zeros(3).pin_memory()
    x = torch.empty(3, device="npu")

    def function() -> torch.Tensor:
        x.copy_(host, non_blocking=True)
        y = x * 3
        back.copy_(y, non_blocking=True)
        return y

    graph, _ = captured(function)
    host.fill_(5)
    graph.replay()
    assert back.tolist() == [15, 15, 15]


def weight() -> torch.Tensor:
    return torch.ones(32, 32, dtype=torch.int8, device="npu")


def x() -> torch.Tensor:
    return torch.ones(4, device="npu")


# What a chip cannot capture, and part of the error.
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "item": (lambda: x().sum().item(), "aten::_local_scalar_dense cannot be captured"),
    "truth": (lambda: bool(x().sum() > 1), "cannot be captured"),
    "to the host": (lambda: x().cpu(), "aten::_to_copy cannot be captured"),
    "from the host": (lambda: torch.ones(3).npu(), "aten::_to_copy cannot be captured"),
    "copy_": (lambda: x().copy_(torch.ones(4)), "aten::copy_ cannot be captured"),
    "mask": (lambda: x()[x() > 0], "aten::index.Tensor cannot be captured"),
    "nonzero": (lambda: x().nonzero(), "aten::nonzero cannot be captured"),
    "format cast": (
        lambda: torch_npu.npu_format_cast(weight(), 29),
        "npu::npu_format_cast cannot be captured",
    ),
    "stream": (
        lambda: torch_npu.npu.current_stream().synchronize(),
        "synchronizing a stream that is captured",
    ),
    "device": (lambda: torch_npu.npu.synchronize(), "synchronizing a device"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, internal_format: None) -> None:
    function, error = REFUSED[case]
    function()
    graph = torch_npu.npu.NPUGraph()
    with pytest.raises(RuntimeError, match=error), torch_npu.npu.graph(graph):
        function()
    assert torch.equal((x() + 1).cpu(), torch.full((4,), 2.0)), "all goes on"


def test_planted_synchronization_is_found() -> None:
    """A check of values, added to a forward of this package."""
    activations = torch.randn(3, 64).bfloat16().npu()
    matrix = torch.randint(-8, 8, (64, 32), dtype=torch.int8).npu()
    scale = torch.rand(32).npu()

    def forward() -> torch.Tensor:
        if activations.abs().max() > 1e6:
            raise ValueError("too large")
        return functional.dynamic_quant_matmul(activations, matrix, scale)

    forward()
    with pytest.raises(RuntimeError, match="cannot be captured"):
        captured(forward)


def test_memory_that_was_freed() -> None:
    """On a chip, a replay would read memory that other code has overwritten."""
    held = [torch.ones(1 << 20, device="npu")]
    graph, y = captured(lambda: held[0] + 1)
    graph.replay()
    assert y[0].item() == 2
    held.clear()
    with pytest.raises(RuntimeError, match=re.escape("memory freed since it was")):
        graph.replay()


def test_external_event_holds_a_replay_back() -> None:
    """Also, arguments that change meanwhile are the ones it uses."""
    event = torch_npu.npu.ExternalEvent()
    side = torch_npu.npu.Stream()
    q = torch.randn(2, 1, 16).half().npu()
    cache = torch.randn(4, 128, 16).half().npu()
    table = torch.arange(2, dtype=torch.int32, device="npu").view(2, 1)
    out, lse = torch.empty_like(q), torch.empty(1, device="npu")
    options = {"input_layout": "TND", "block_table": table, "block_size": 128}
    stream = torch_npu.npu.current_stream

    def attend(lengths: list[int]) -> None:
        torch_npu.npu_fused_infer_attention_score.out(
            q,
            cache,
            cache,
            actual_seq_lengths=[1, 2],
            actual_seq_lengths_kv=lengths,
            out=[out, lse],
            **options,
        )

    graph = torch_npu.npu.NPUGraph()
    with torch_npu.npu.graph(graph):
        event.wait(stream())
        event.reset(stream())
        torch_npu.npu.graph_task_group_begin(stream())
        attend([5, 5])
        handle = torch_npu.npu.graph_task_group_end(stream())
    expected = []
    for lengths in ([3, 7], [9, 2]):
        attend(lengths)
        expected.append(out.cpu())
    assert not torch.equal(*expected)
    for lengths, right in zip(([3, 7], [9, 2]), expected):
        out.zero_()
        graph.replay()
        with torch_npu.npu.stream(side):
            torch_npu.npu.graph_task_update_begin(side, handle)
            attend(lengths)
            torch_npu.npu.graph_task_update_end(side)
            event.record(side)
        assert torch.equal(out.cpu(), right)


def test_operator_behind_a_graph_that_waits() -> None:
    event = torch_npu.npu.ExternalEvent()
    y = torch.ones(2, device="npu")
    graph = torch_npu.npu.NPUGraph()
    with torch_npu.npu.graph(graph):
        event.wait(torch_npu.npu.current_stream())
        event.reset(torch_npu.npu.current_stream())
        y.add_(1)
    y.fill_(1)
    graph.replay()
    with pytest.raises(RuntimeError, match="after a graph that waits for an event"):
        y + 1
    with torch_npu.npu.stream(torch_npu.npu.Stream()) as _:
        event.record(torch_npu.npu.current_stream())
    assert (y + 1).tolist() == [3, 3]
