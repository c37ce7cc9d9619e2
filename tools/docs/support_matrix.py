# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Write the tables of supported schemes, generated from code and tests, into docs/.

python -m tools.docs.support_matrix
"""

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.docs import section

if TYPE_CHECKING:
    from tests.evidence import Case, Evidence

PAGE = Path(__file__).parents[2] / "docs" / "support-matrix.md"
START, END = "<!-- support matrix: tools/docs/support_matrix.py -->\n", "<!-- end -->\n"
CHIPS = {"A2": "bfloat16", "A3": "bfloat16", "310P": "float16", "A5": "bfloat16"}

NO = "no"
# Marks a scheme that makes an operator call which is unproven on the chip.
MARK = " *"

_CHANNEL = {"strategy": "channel"}
_GROUP = {"strategy": "group", "group_size": 128}
_GROUP_256 = {"strategy": "group", "group_size": 256}
_TOKEN = {"num_bits": 8, "strategy": "token", "dynamic": True}
_TENSOR = {"num_bits": 8, "strategy": "tensor"}
_FLOAT8 = {"num_bits": 8, "type": "float"}


def _row(
    bits: int,
    layout: dict[str, Any],
    inputs: dict[str, Any] | None = None,
    fmt: str = "pack-quantized",
    **weights: Any,
) -> dict[str, Any]:
    group = {
        "targets": ["Linear"],
        "weights": {"num_bits": bits, **layout, **weights},
        "input_activations": inputs,
    }
    return {"format": fmt, "config_groups": {"group_0": group}}


def _with_outputs(config: dict[str, Any]) -> dict[str, Any]:
    config["config_groups"]["group_0"]["output_activations"] = _TENSOR
    return config


# (scheme, formats, operators in one forward) -> an example config
Rows = dict[tuple[str, str, str], dict[str, Any]]
_FLOAT = "float-quantized"
_BLOCK = {"strategy": "block", "block_structure": [128, 128]}
_MX = {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
_MX_INPUTS = {**_MX, "type": "float", "dynamic": True}
_NV = {"strategy": "tensor_group", "group_size": 16}
FLOAT_ROWS: Rows = {
    ("FP8, dynamic", _FLOAT, "1; A5 2, with bias 3"): _row(
        8, _CHANNEL, {**_TOKEN, **_FLOAT8}, _FLOAT, type="float"
    ),
    ("FP8, static", _FLOAT, "1"): _row(
        8, {"strategy": "tensor"}, {**_TENSOR, **_FLOAT8}, _FLOAT, type="float"
    ),
    ("FP8 in blocks", _FLOAT, "1"): _row(8, _BLOCK, None, _FLOAT, type="float"),
    ("MXFP8", "mxfp8-quantized", "1; A5 2"): _row(
        8, _MX, _MX_INPUTS | {"num_bits": 8}, "mxfp8-quantized", type="float"
    ),
    ("MXFP4", "mxfp4-pack-quantized", "1; A5 2"): _row(
        4, _MX, _MX_INPUTS | {"num_bits": 4}, "mxfp4-pack-quantized", type="float"
    ),
    ("NVFP4", "nvfp4-pack-quantized", "1"): _row(
        4, _NV, None, "nvfp4-pack-quantized", type="float"
    ),
}
ROWS: Rows = {
    ("W2A16, W3A16, W4A16 per channel", "pack-quantized", "1"): _row(4, _CHANNEL),
    ("W2A16, W3A16, W4A16 in groups", "pack-quantized", "1"): _row(4, _GROUP),
    ("W5A16 to W8A16 per channel", "pack-quantized", "1"): _row(8, _CHANNEL),
    ("W5A16 to W8A16 in groups", "pack-quantized", "1"): _row(8, _GROUP),
    ("W8A8, dynamic, symmetric", "int-quantized", "2"): _row(
        8, _CHANNEL, _TOKEN, "int-quantized"
    ),
    ("W8A8, dynamic, asymmetric", "int-quantized", "2 + 5 or 6 elementwise"): _row(
        8, _CHANNEL, {**_TOKEN, "symmetric": False}, "int-quantized"
    ),
    ("W8A8, static", "int-quantized", "2"): _row(8, _CHANNEL, _TENSOR, "int-quantized"),
    ("W4A8 per channel", "either", "2, with bias 3"): _row(
        4, _CHANNEL, _TOKEN, "int-quantized"
    ),
    ("W4A8 in groups of 256", "either", "2, with bias 3"): _row(
        4, _GROUP_256, _TOKEN, "int-quantized"
    ),
    ("W4A8 in other groups", "either", "1"): _row(4, _GROUP, _TOKEN, "int-quantized"),
    ("W2A8, W3A8 like W4A8", "pack-quantized", "2, with bias 3"): _row(
        3, _CHANNEL, _TOKEN
    ),
    ("W5A8 to W8A8 per channel", "pack-quantized", "2"): _row(8, _CHANNEL, _TOKEN),
    ("W5A8 to W8A8 in groups", "pack-quantized", "1"): _row(8, _GROUP, _TOKEN),
    ("W2A8O8, W4A8O8", "either", "3 + 4 elementwise"): _with_outputs(
        _row(4, _CHANNEL, _TENSOR)
    ),
    ("W8A8O8", "either", "3 + 4 elementwise"): _with_outputs(
        _row(8, _CHANNEL, _TENSOR, "int-quantized")
    ),
    **FLOAT_ROWS,
}
EXPERT_ROWS: Rows = {
    ("W2A16, W3A16, W4A16 per channel", "pack-quantized", "5"): _row(4, _CHANNEL),
    ("W2A16, W3A16, W4A16 in groups", "pack-quantized", "5"): _row(4, _GROUP),
    ("W5A16 to W8A16 per channel", "pack-quantized", "5"): _row(8, _CHANNEL),
    ("W5A16 to W8A16 in groups", "pack-quantized", ""): _row(8, _GROUP),
    ("W8A8, dynamic, symmetric", "int-quantized", "5"): _row(
        8, _CHANNEL, _TOKEN, "int-quantized"
    ),
    ("W8A8, dynamic, asymmetric", "int-quantized", "5"): _row(
        8, _CHANNEL, {**_TOKEN, "symmetric": False}, "int-quantized"
    ),
    ("W8A8, static", "int-quantized", ""): _row(8, _CHANNEL, _TENSOR, "int-quantized"),
    ("W4A8 per channel", "either", "4"): _row(4, _CHANNEL, _TOKEN, "int-quantized"),
    ("W4A8 in groups of 256", "either", "4"): _row(
        4, _GROUP_256, _TOKEN, "int-quantized"
    ),
    ("W4A8 in other groups", "either", "5"): _row(4, _GROUP, _TOKEN, "int-quantized"),
    ("W2A8, W3A8 like W4A8", "pack-quantized", "4"): _row(3, _CHANNEL, _TOKEN),
    ("W5A8 to W8A8 per channel", "pack-quantized", "5"): _row(8, _CHANNEL, _TOKEN),
    **{
        (name, fmt, f"as unquantized{'; A5 7' * ('A5' in operators)}"): row
        for (name, fmt, operators), row in FLOAT_ROWS.items()
    },
}


def row_of(name: str) -> str | None:
    """The row that a scheme of `tools.checkpoints.make_checkpoint` is an example of.

    None for what the tables do not tell apart: FP8 and MXFP4 or NVFP4 weights without
    quantized activations, and zero points beside int8 or of activations beside int4.
    """
    from tools.checkpoints.make_checkpoint import ALL_SCHEMES

    scheme = ALL_SCHEMES[name]
    weights, inputs = scheme.weights, scheme.input_activations
    if weights.type == "float":
        return None if inputs is None else _float_row(weights, inputs)
    bits, groups = weights.num_bits, weights.group_size
    layout = "in groups" if groups else "per channel"
    if scheme.output_activations is not None:
        return "W8A8O8" if bits == 8 else "W2A8O8, W4A8O8"
    if inputs is None:
        return f"{'W2A16, W3A16, W4A16' if bits <= 4 else 'W5A16 to W8A16'} {layout}"
    if bits == 8 and scheme.format != "pack-quantized":
        symmetry = "symmetric" if inputs.symmetric else "asymmetric"
        return f"W8A8, dynamic, {symmetry}" if inputs.dynamic else "W8A8, static"
    if not weights.symmetric or not inputs.symmetric:
        return None
    if bits > 4:
        return f"W5A8 to W8A8 {layout}"
    if bits < 4:
        return "W2A8, W3A8 like W4A8"
    names = {None: "per channel", 256: "in groups of 256"}
    return f"W4A8 {names.get(groups, 'in other groups')}"


def _float_row(weights: Any, inputs: Any) -> str:
    if weights.strategy == "tensor_group":
        return "NVFP4"
    if weights.strategy == "group":
        return f"MXFP{weights.num_bits}"
    if weights.strategy == "block":
        return "FP8 in blocks"
    return "FP8, dynamic" if inputs.dynamic else "FP8, static"


def evidence_of(
    row: str, chip: str, experts: bool, tested: "Mapping[Case, Evidence]"
) -> "Evidence":
    """The most that is known of any scheme of a row on a chip."""
    from tests.evidence import Evidence

    known = (
        evidence
        for case, evidence in tested.items()
        if (case.chip, case.experts, row_of(case.scheme)) == (chip, experts, row)
    )
    return max(known, default=Evidence.UNTESTED)


def outcome_of(
    config: dict[str, Any], dtype: Any, build: Callable[[Any, Any], str]
) -> tuple[str, str]:
    """Say what becomes of a config on the current chip, and mark it if unproven."""
    from vllm.model_executor.layers.quantization import get_quantization_config

    from tools.numerics.enumerate_configs import RESOLVED, experts, outcome
    from vllm_ascend_ct.ops.precedents import unproven
    from vllm_ascend_ct.ops.soc import current_soc

    made = get_quantization_config("compressed-tensors")
    result = outcome(made, config, dtype, build)
    if result in ("refused", RESOLVED):
        return NO if result == "refused" else "16 bits", ""
    group = config["config_groups"]["group_0"]
    dynamic = (group["input_activations"] or {}).get("dynamic")
    only_weights = "WNA16" in result.split()[-1]
    calls = products(config, only_weights, build is experts)
    mark = MARK if any(unproven(*call, current_soc()) for call in calls) else ""
    return "weights" if dynamic and only_weights else "yes", mark


def products(
    config: dict[str, Any], only_weights: bool, experts: bool
) -> list[tuple[str, str]]:
    """The operators that quantize and multiply, with the kinds of their calls.

    Args:
        config: `quantization_config` of a checkpoint.
        only_weights: Whether it is served as weight-only.
        experts: Whether the layer is one of experts.

    """
    from vllm_ascend_ct.ops import precedents as forms
    from vllm_ascend_ct.ops.limits import current_limits
    from vllm_ascend_ct.weights.pack_quantized import operator_bits

    group = config["config_groups"]["group_0"]
    weights, inputs = group["weights"], group["input_activations"]
    bits, groups = operator_bits(weights["num_bits"]), weights["strategy"]
    multiply = [forms.FUSED_GATE, forms.GROUPED] if experts else [forms.QUANT_MATMUL]
    if weights.get("type") == "float" and groups == "group":
        kind = f"mxfp{bits}"
        return [(name, kind) for name in (forms.DYNAMIC_MX_QUANT, *multiply)]
    if weights.get("type") == "float":
        dynamic = (forms.DYNAMIC_QUANT, "dynamic-fp8")
        return [dynamic, *((name, "fp8") for name in multiply)]
    static = [(forms.QUANTIZE, "static")] if inputs == _TENSOR else []
    if only_weights:
        operator = forms.GROUPED if experts else forms.WEIGHT_ONLY
        return [*static, (operator, f"w{bits}a16-{groups}")]
    kind = "w8a8" if bits == 8 else f"w4a8-{groups}"
    dynamic = (forms.DYNAMIC_QUANT, "dynamic")
    if experts and current_limits().quant_grouped_matmul_dequant is not None:
        return [(forms.GROUPED_DEQUANT, kind)]
    if experts:
        return [dynamic, *((name, kind) for name in multiply)]
    if static:
        return [*static, (forms.QUANT_MATMUL, "w8a8-static")]
    if not inputs.get("symmetric", True):
        asymmetric = (forms.DYNAMIC_QUANT_ASYMMETRIC, "dynamic")
        return [asymmetric, (forms.QUANT_MATMUL, "w8a8-asymmetric")]
    return [dynamic, (forms.QUANT_MATMUL, kind)]


def table(rows: Rows, build: Callable[[Any, Any], str]) -> str:
    """Make one table. Needs vLLM's parallel state.

    Args:
        rows: The rows of the table.
        build: Builds a linear layer or experts.

    """
    import torch

    from tests.evidence import collect
    from tools.numerics.enumerate_configs import experts

    tested = collect()
    lines = [
        f"| scheme | format | operators in one forward | {' | '.join(CHIPS)} |",
        "| --- " * (3 + len(CHIPS)) + "|",
    ]
    before = os.environ.get("VLLM_ASCEND_CT_SOC")
    made: dict[tuple[str, str, str], list[str]] = {names: [] for names in rows}
    try:
        for chip, dtype in CHIPS.items():
            os.environ["VLLM_ASCEND_CT_SOC"] = chip
            for names, config in rows.items():
                verdict, mark = outcome_of(config, getattr(torch, dtype), build)
                if verdict != NO:
                    known = evidence_of(names[0], chip, build is experts, tested)
                    verdict = f"{verdict}, {known}{mark}"
                made[names].append(verdict)
    finally:
        os.environ.pop("VLLM_ASCEND_CT_SOC")
        if before is not None:
            os.environ["VLLM_ASCEND_CT_SOC"] = before
    lines += [f"| {' | '.join((*names, *cells))} |" for names, cells in made.items()]
    return "\n".join(lines) + "\n"


def tables() -> str:
    """Make the tables of linear layers and of experts."""
    from tools.numerics.enumerate_configs import experts, linear

    return f"{table(ROWS, linear)}\n## Routed experts\n\n{table(EXPERT_ROWS, experts)}"


def with_table(page: str, made: str) -> str:
    """Replace the tables in the page's text."""
    return section.replace(page, START, END, made)


def main() -> None:
    # Before anything imports vLLM.
    os.environ["VLLM_PLUGINS"] = "ascend_ct"
    os.environ["VLLM_ASCEND_CT_EMULATE"] = "1"

    from vllm.plugins import load_general_plugins
    from vllm.utils.network_utils import get_open_port

    from tools.stacks.ranks import tensor_parallel

    logging.disable(logging.WARNING)
    load_general_plugins()
    with tensor_parallel(rank=0, world_size=1, port=get_open_port()):
        PAGE.write_text(with_table(PAGE.read_text(), tables()))


if __name__ == "__main__":
    main()
