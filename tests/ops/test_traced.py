# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Names of operators in traced graphs."""

from collections.abc import Callable

import torch

from tests.ops.calls import choices
from vllm_ascend_ct.fused_moe.functional import sort_tokens
from vllm_ascend_ct.ops.traced import weight_quant_batchmatmul


def test_graph_has_no_name_that_npugraph_ex_fails_on() -> None:
    """And the compiled call computes the same as the plain one."""
    names: list[str] = []

    def note(module: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        names.extend(str(node.target) for node in module.graph.nodes)
        return module

    x = torch.randn(3, 64, dtype=torch.bfloat16)
    weight = torch.randint(-128, 128, (32, 64), dtype=torch.int8).t()
    scale = torch.rand(1, 32, dtype=torch.bfloat16)
    arguments = (x, weight, scale, None, None, 0)
    compiled = torch.compile(weight_quant_batchmatmul, backend=note, fullgraph=True)
    torch.testing.assert_close(
        compiled(*arguments), weight_quant_batchmatmul(*arguments), rtol=0, atol=0
    )
    assert "ascend_ct.weight_quant_batchmatmul" in names
    assert not any(name.startswith("npu.") for name in names)
    torch.library.opcheck(torch.ops.ascend_ct.weight_quant_batchmatmul, arguments)


def test_graph_does_not_hold_how_many_tokens_there_are() -> None:
    """One graph serves all batch sizes, although the operator takes a plain integer."""
    graphs = []

    def note(module: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(module)
        return module

    def sort(x: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        return sort_tokens(x, topk_ids, (0, 4), 4, quantize=True).rows

    compiled = torch.compile(sort, backend=note, fullgraph=True)
    for tokens in (4, 5, 6):
        x = torch.randn(tokens, 64).bfloat16()
        topk_ids = choices()[:tokens]
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(topk_ids, 0)
        assert torch.equal(compiled(x, topk_ids), sort(x, topk_ids))
    assert len(graphs) == 1
