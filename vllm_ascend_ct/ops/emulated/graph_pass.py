# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""A pass over inductor's graphs that fuses the emulated quantization of activations.

As a Python operator it takes as long as multiplying one row by a small weight.
"""

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.pattern_matcher import (
    Arg,
    CallFunction,
    Match,
    PatternMatcherPass,
    register_graph_pattern,
)

from vllm_ascend_ct.ops.emulated import quantize
from vllm_ascend_ct.ops.soc import Soc, current_soc

SOCS = (Soc.A2, Soc.A3)


class InlineDynamicQuant(CustomGraphPass):
    """Replace `npu_dynamic_quant` to int8 by its formula, for inductor to fuse.

    Only on chips in `SOCS`. Inductor's caches know the chip by `uuid`.
    """

    def __call__(self, graph: torch.fx.Graph) -> None:
        if current_soc() not in SOCS:
            return
        patterns = PatternMatcherPass(pass_name="inline_dynamic_quant")

        @register_graph_pattern(
            CallFunction(torch.ops.npu.npu_dynamic_quant.default, Arg()),
            pass_dict=patterns,
        )
        def inline(match: Match, x: torch.fx.Node) -> None:
            match.replace_by_example(_quantize, [x])

        patterns.apply(graph)

    def uuid(self) -> str:
        """Identify this pass, its formula and the chip in keys of caches."""
        files = get_hash_for_files((__file__, quantize.__file__))
        return f"{current_soc().value}-{files.hex()}"


def _quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    largest = x.new_full((), 127, dtype=torch.float32)
    # Inductor fuses without rounding to 16 bits in between, unless it needs the bits.
    rounded = x.view(torch.int16).view(x.dtype)
    return quantize.int8_rows(rounded.float(), largest)
