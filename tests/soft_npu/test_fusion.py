# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""vllm-ascend's graph passes with its norms and our layers.

They fuse a norm and the following quantization into one operator. Runs on each
supported release.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.kernels.linear import Int8ScaledMMLinearLayerConfig

from tools.bench.bench_load import parameters
from tools.bench.launches import Launches
from tools.soft_npu import suite
from vllm_ascend_ct.kernels.linear.scaled_mm.ascend import (
    AscendInt8ScaledMMLinearKernel,
)

pytestmark = pytest.mark.soft_npu
M, K, N = 5, 128, 64
EPSILON = 1e-6
# Neither it nor its reciprocal is representable in bfloat16.
INPUT_SCALE, ZERO_POINT = 0.0301, 3
# bfloat16 rounds both by 0.2 %. If the norm does not quantize, one integer in 20 is off
# by one of about 20.
TOLERANCE = 2e-2
NORM, PRODUCT = "_C_ascend.npu_add_rms_norm_bias", "npu.npu_quant_matmul"
OWN_NORM = "npu.npu_add_rms_norm"
# A pass of 0.23 that splits rows among ranks; with one rank it splits nothing.
FREE = {"vllm.maybe_chunk_residual"}


@pytest.fixture(scope="module")
def vllm_config() -> Iterator[Any]:
    suite.prepare(["dense-w8a8"])
    model = str(suite.checkpoint("dense-w8a8"))
    config = EngineArgs(model, dtype="bfloat16").create_engine_config()
    config.quant_config = None
    with set_current_vllm_config(config):
        yield config


@pytest.fixture(scope="module")
def passes(vllm_config: Any) -> Any:
    """vllm-ascend's default passes. It registers each pattern once per process."""
    from vllm_ascend.compilation.graph_fusion_pass_manager import (
        GraphFusionPassManager,
    )

    manager = GraphFusionPassManager()
    manager.configure(vllm_config)
    names = [type(found).__name__ for found in manager.passes]
    assert "AddRMSNormQuantFusionPass" in names
    return manager


class Block(torch.nn.Module):
    """A norm of a sum, followed by an int8 layer.

    Attributes:
        formula: Function of x and the residual, in float64.

    """

    def __init__(self, norm_name: str, static: bool, symmetric: bool) -> None:
        from vllm_ascend.ops import layernorm

        super().__init__()
        torch.manual_seed(0)
        config = Int8ScaledMMLinearLayerConfig(
            is_static_input_scheme=static,
            is_channelwise=True,
            input_symmetric=symmetric,
        )
        names = ["weight", "scale", "input_scale", "input_zero_point", "azp_adj"]
        self.kernel = AscendInt8ScaledMMLinearKernel(config, names)
        weight = torch.randint(-127, 128, (N, K), dtype=torch.int8)
        scale = torch.rand(N, 1) / 100 + 0.01
        self.exact = (weight.double() * scale.double()).t()
        self.static, self.zero_point = static, 0 if symmetric else ZERO_POINT
        self.layer: Any = parameters(
            weight=weight,
            scale=scale,
            input_scale=torch.tensor([INPUT_SCALE]),
            input_zero_point=torch.tensor([self.zero_point], dtype=torch.int8),
        ).npu()
        self.layer.params_dtype = torch.bfloat16
        self.kernel.process_weights_after_loading(self.layer)
        self.norm = getattr(layernorm, norm_name)(K, EPSILON).bfloat16().npu()
        gamma = torch.rand(K).bfloat16()
        self.norm.weight.data.copy_(gamma)
        self.gamma = gamma.double() + ("Gemma" in norm_name)

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x, residual = self.norm.forward_oot(x, residual)
        return self.kernel.apply_weights(self.layer, x), residual

    def formula(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        total = x.double() + residual.double()
        y = total * (total.square().mean(1, keepdim=True) + EPSILON).rsqrt()
        y = y * self.gamma
        step = torch.tensor([[INPUT_SCALE]]).double()
        if not self.static:
            step = y.abs().amax(1, keepdim=True) / 127
        q = (y / step + self.zero_point).round().clamp(-128, 127)
        return (q - self.zero_point) * step @ self.exact


def recording(function: Callable[..., Any], names: list[str]) -> Callable[..., Any]:
    """The same passes, which also record launches."""

    def call(*args: Any) -> Any:
        with Launches() as launches:
            result = function(*args)
        names[:] = [name for name in launches.names if name not in FREE]
        return result

    return call


@torch.inference_mode()
def before_and_after(block: Block, passes: Any) -> tuple[list[str], list[str]]:
    """Launches of a block, eager and compiled; both are compared with its formula."""
    from vllm.compilation.passes.inductor_pass import pass_context
    from vllm.config.utils import Range
    from vllm_ascend.compilation.compiler_interface import fusion_pass_compile
    from vllm_ascend.utils import COMPILATION_PASS_KEY

    def backend(graph: Any, inputs: Any) -> Any:
        size = Range(1, 512)
        with pass_context(size):
            options = {COMPILATION_PASS_KEY: passes}
            compiled, _ = fusion_pass_compile(graph, inputs, options, size)
        # Inside: under an active mode, dynamo runs nothing compiled.
        return recording(compiled, after)

    before: list[str] = []
    after: list[str] = []

    torch._dynamo.reset()
    compiled = torch.compile(block, backend=backend, fullgraph=True)
    operands = [torch.randn(M, K).bfloat16() for _ in range(2)]
    on_npu = [x.npu() for x in operands]
    expected = block.formula(*operands)
    for function in (recording(block, before), compiled):
        y, total = function(*on_npu)
        error = (y.cpu().double() - expected).norm() / expected.norm()
        assert error < TOLERANCE
        assert torch.equal(total.cpu(), operands[0] + operands[1])
    return before, after


@pytest.mark.parametrize("symmetric", [True, False])
def test_static(symmetric: bool, passes: Any) -> None:
    block = Block("AscendRMSNorm", static=True, symmetric=symmetric)
    before, after = before_and_after(block, passes)
    assert before == [NORM, "vllm.quantize", PRODUCT]
    assert after == ["npu.npu_add_rms_norm_quant", PRODUCT]


@pytest.mark.parametrize("norm", ["AscendRMSNorm", "AscendGemmaRMSNorm"])
def test_dynamic_behind_torch_npus_norm(
    norm: str, passes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As norms are on A5, and with batch-invariant results."""
    from vllm_ascend.ops import layernorm

    monkeypatch.setattr(layernorm, "enable_custom_op", lambda: False)
    block = Block(norm, static=False, symmetric=True)
    before, after = before_and_after(block, passes)
    if NORM in before:
        pytest.skip(f"this release calls its own norm there: {before}")
    plus_one = ["aten.add"] * ("Gemma" in norm)
    assert before == [*plus_one, OWN_NORM, "npu.npu_dynamic_quant", PRODUCT]
    assert after == [*plus_one, "npu.npu_add_rms_norm_dynamic_quant", PRODUCT]


@pytest.mark.parametrize("static", [False, True])
def test_what_no_pattern_has(
    static: bool, passes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dynamic after vllm-ascend's norm without a bias, and static by division.

    Its `AddRMSNormDynamicQuantPattern` has torch_npu's norm, `...WithBias` a tensor as
    bias, and `AddRMSNormQuantPattern` reciprocals.
    """
    monkeypatch.setenv("VLLM_ASCEND_CT_LAYOUT", "w8a8-static=divided")
    block = Block("AscendRMSNorm", static, symmetric=True)
    before, after = before_and_after(block, passes)
    quantize = "npu.npu_quantize" if static else "npu.npu_dynamic_quant"
    assert before == after == [NORM, quantize, PRODUCT]
