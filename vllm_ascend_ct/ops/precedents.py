# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Which operator calls are known to have run on which chip.

There is a row for each form of a call that this package makes. This project has not run
any of them on a chip itself: a row names public code that makes the same call there. If
a row names none, the call is unproven: it relies on the operator's documents and host
checks only.
"""

from dataclasses import dataclass
from typing import NamedTuple

from vllm_ascend_ct.ops.soc import Soc, current_soc


class Form(NamedTuple):
    """A form of an operator call.

    Attributes:
        operator: Name of the operator in `torch.ops.npu`.
        kind: For a matmul, the widths of weights and activations and the granularity of
            the scales, like `w4a16-group`. For other operators, their purpose, like
            `routing` or `dynamic`.
        layout: For a matmul, the layout of the weight. For other operators, the form of
            their operands.

    """

    operator: str
    kind: str
    layout: str


@dataclass(frozen=True)
class Precedent:
    """What is known about one form of a call on some chips.

    Attributes:
        form: The call.
        chips: Chips on which this package makes the call.
        source: Public code that makes the same call on such a chip: a repository with a
            file or a pull request. None if the call is unproven.
        shown: In which setting that code ran the call; for an unproven call, the most
            similar call that is known to have run.

    """

    form: Form
    chips: tuple[Soc, ...]
    source: str | None
    shown: str


WEIGHT_ONLY = "npu_weight_quant_batchmatmul"
QUANT_MATMUL = "npu_quant_matmul"
QUANT_MATMUL_DEQUANT = "npu_quant_matmul_dequant"
GROUPED = "npu_grouped_matmul"
GROUPED_DEQUANT = "npu_quant_grouped_matmul_dequant"
FUSED_GATE = "npu_grouped_matmul_swiglu_quant_v2"
DYNAMIC_QUANT = "npu_dynamic_quant"
DYNAMIC_MX_QUANT = "npu_dynamic_mx_quant"
DYNAMIC_QUANT_ASYMMETRIC = "npu_dynamic_quant_asymmetric"
QUANTIZE = "npu_quantize"

CONTIGUOUS, TRANSPOSED = "contiguous", "transposed"
NZ, TRANSPOSED_NZ = "nz", "transposed-nz"
# Activations divided by an fp32 scale, or multiplied by its reciprocal in their dtype.
DIVIDED, RECIPROCAL = "divided", "reciprocal"
ROWS = "rows"

_A2_A3, _A5, _310P = (Soc.A2, Soc.A3), (Soc.A5,), (Soc.ASCEND_310P,)
_VLLM_ASCEND = "vllm-project/vllm-ascend v0.23.0, vllm_ascend/"
_METHODS = f"{_VLLM_ASCEND}quantization/methods/"
_METHODS_310P = f"{_VLLM_ASCEND}_310p/quantization/methods/"
_OP_PLUGIN = "Ascend/op-plugin, test/test_custom_ops/"
_DOCUMENTS = "documents only"


def _row(
    operator: str,
    kind: str,
    layout: str,
    chips: tuple[Soc, ...],
    source: str | None,
    shown: str = _DOCUMENTS,
) -> Precedent:
    return Precedent(Form(operator, kind, layout), chips, source, shown)


# For each operator and kind, the layout of vllm-ascend's default settings comes first.
PRECEDENTS: tuple[Precedent, ...] = (
    _row(
        WEIGHT_ONLY,
        "w4a16-group",
        CONTIGUOUS,
        _A2_A3,
        "sgl-project/sglang #15203; ModelCloud/GPTQModel, hw/komodo_cann.md",
        "910B, float16, groups of 32 to 128",
    ),
    _row(WEIGHT_ONLY, "w4a16-group", CONTIGUOUS, _A5, None),
    _row(
        WEIGHT_ONLY,
        "w4a16-group",
        TRANSPOSED,
        _A2_A3,
        None,
        "910B, float16, groups of 32 without zero points: ggml-org/llama.cpp, "
        "ggml/src/ggml-cann, Q4_0",
    ),
    _row(WEIGHT_ONLY, "w4a16-group", TRANSPOSED, _A5, None),
    _row(
        WEIGHT_ONLY,
        "w4a16-channel",
        TRANSPOSED,
        _A2_A3,
        None,
        "aclnnWeightQuantBatchMatmulV2.md recommends it",
    ),
    _row(WEIGHT_ONLY, "w4a16-channel", TRANSPOSED, _A5, None),
    _row(
        WEIGHT_ONLY,
        "w8a16-channel",
        TRANSPOSED,
        _A2_A3,
        None,
        "in FRACTAL_NZ, not transposed: vllm-project/vllm-ascend #4541",
    ),
    _row(WEIGHT_ONLY, "w8a16-channel", TRANSPOSED, (*_310P, *_A5), None),
    _row(
        WEIGHT_ONLY,
        "w8a16-group",
        TRANSPOSED,
        _A2_A3,
        None,
        "910B, float16, groups of 32 without zero points: ggml-org/llama.cpp, "
        "ggml/src/ggml-cann, Q8_0",
    ),
    _row(WEIGHT_ONLY, "w8a16-group", TRANSPOSED, _A5, None),
    _row(
        DYNAMIC_QUANT,
        "dynamic",
        ROWS,
        (*_A2_A3, *_A5),
        f"{_METHODS}w8a8_dynamic.py",
        "serving",
    ),
    _row(
        DYNAMIC_QUANT,
        "dynamic",
        ROWS,
        _310P,
        f"{_METHODS_310P}w8a8_dynamic.py",
        "serving",
    ),
    _row(
        DYNAMIC_QUANT,
        "dynamic-fp8",
        ROWS,
        _A5,
        f"{_METHODS}w8a8fp8_dynamic.py",
        "serving",
    ),
    _row(
        DYNAMIC_MX_QUANT,
        "mxfp8",
        ROWS,
        _A5,
        f"{_METHODS}w8a8_mxfp8.py",
        "serving",
    ),
    _row(
        DYNAMIC_MX_QUANT,
        "mxfp4",
        ROWS,
        _A5,
        f"{_METHODS}w4a4_mxfp4.py",
        "serving; its experts round half to even, its linear layers half away from 0",
    ),
    _row(
        DYNAMIC_QUANT_ASYMMETRIC,
        "dynamic",
        ROWS,
        _A2_A3,
        f"{_OP_PLUGIN}test_npu_dynamic_quant_asymmetric.py",
        "910B, a test of the operator",
    ),
    _row(DYNAMIC_QUANT_ASYMMETRIC, "dynamic", ROWS, _A5, None),
    _row(
        QUANTIZE,
        "static",
        RECIPROCAL,
        _A2_A3,
        f"{_METHODS}w8a8_static.py; sgl-project/sglang",
        "serving",
    ),
    _row(QUANTIZE, "static", RECIPROCAL, _A5, None),
    _row(
        QUANTIZE,
        "static",
        RECIPROCAL,
        _310P,
        f"{_METHODS_310P}w8a8_static.py",
        "serving",
    ),
    _row(
        QUANTIZE,
        "static",
        DIVIDED,
        tuple(Soc),
        None,
        f"with reciprocals in the model's dtype: {_METHODS}w8a8_static.py",
    ),
    _row(
        QUANT_MATMUL,
        "w8a8",
        NZ,
        _A2_A3,
        f"{_METHODS}w8a8_dynamic.py; sgl-project/sglang",
        "serving",
    ),
    _row(
        QUANT_MATMUL,
        "w8a8",
        TRANSPOSED,
        _A2_A3,
        "DeepLink-org/dlinfer",
        "serving",
    ),
    _row(QUANT_MATMUL, "w8a8", NZ, _A5, None),
    _row(QUANT_MATMUL, "w8a8", TRANSPOSED, _A5, None),
    _row(
        QUANT_MATMUL,
        "w8a8",
        TRANSPOSED_NZ,
        _310P,
        f"{_METHODS_310P}w8a8_dynamic.py",
        "serving, with an accuracy issue that the file mentions",
    ),
    _row(
        QUANT_MATMUL,
        "fp8",
        CONTIGUOUS,
        _A5,
        f"{_METHODS}w8a8fp8_dynamic.py",
        "serving; adds a bias afterwards because of a fault that the file mentions",
    ),
    _row(
        QUANT_MATMUL,
        "mxfp8",
        CONTIGUOUS,
        _A5,
        f"{_METHODS}w8a8_mxfp8.py",
        "serving",
    ),
    _row(
        QUANT_MATMUL,
        "mxfp4",
        TRANSPOSED,
        _A5,
        f"{_METHODS}w4a4_mxfp4.py",
        "serving",
    ),
    _row(
        QUANT_MATMUL_DEQUANT,
        "w8a8",
        CONTIGUOUS,
        _310P,
        "vllm-project/vllm-ascend #11427",
        "310P, Qwen3-32B",
    ),
    _row(
        QUANT_MATMUL,
        "w8a8-static",
        NZ,
        _A2_A3,
        f"{_METHODS}w8a8_static.py",
        "serving",
    ),
    _row(
        QUANT_MATMUL,
        "w8a8-static",
        TRANSPOSED,
        _A2_A3,
        None,
        f"in FRACTAL_NZ: {_METHODS}w8a8_static.py",
    ),
    _row(QUANT_MATMUL, "w8a8-static", NZ, _A5, None),
    _row(QUANT_MATMUL, "w8a8-static", TRANSPOSED, _A5, None),
    _row(
        QUANT_MATMUL,
        "w8a8-static",
        TRANSPOSED_NZ,
        _310P,
        f"{_METHODS_310P}w8a8_static.py",
        "serving",
    ),
    _row(
        QUANT_MATMUL,
        "w8a8-asymmetric",
        NZ,
        _A2_A3,
        f"{_OP_PLUGIN}test_npu_quant_matmul.py",
        "910B, tests of the operator with int32 results",
    ),
    _row(
        QUANT_MATMUL,
        "w8a8-asymmetric",
        TRANSPOSED,
        _A2_A3,
        f"{_OP_PLUGIN}test_npu_quant_matmul.py",
        "910B, tests of the operator with int32 results",
    ),
    _row(QUANT_MATMUL, "w8a8-asymmetric", NZ, _A5, None),
    _row(QUANT_MATMUL, "w8a8-asymmetric", TRANSPOSED, _A5, None),
    _row(
        QUANT_MATMUL,
        "w4a8-group",
        CONTIGUOUS,
        _A2_A3,
        f"{_OP_PLUGIN}test_npu_quant_matmul.py",
        "910B, a test of the operator with one row",
    ),
    _row(
        QUANT_MATMUL,
        "w4a8-channel",
        CONTIGUOUS,
        _A2_A3,
        None,
        "with the scale repeated for groups of 256: sgl-project/sgl-kernel-npu",
    ),
    _row(
        GROUPED,
        "w4a16-group",
        CONTIGUOUS,
        _A2_A3,
        f"{_METHODS}w4a16.py; {_OP_PLUGIN}test_npu_grouped_matmul.py",
        "serving; only the test has zero points",
    ),
    _row(GROUPED, "w4a16-group", CONTIGUOUS, _A5, None),
    _row(
        GROUPED,
        "w4a16-channel",
        CONTIGUOUS,
        _A2_A3,
        None,
        f"per group: {_METHODS}w4a16.py",
    ),
    _row(GROUPED, "w4a16-channel", CONTIGUOUS, _A5, None),
    _row(GROUPED, "w8a16-channel", TRANSPOSED, (*_A2_A3, *_A5), None),
    _row(
        GROUPED,
        "w8a8",
        NZ,
        _A2_A3,
        f"{_VLLM_ASCEND}ops/fused_moe/moe_mlp.py; sgl-project/sglang",
        "serving",
    ),
    _row(GROUPED, "w8a8", NZ, _A5, None),
    _row(
        GROUPED,
        "w8a8",
        TRANSPOSED,
        (*_A2_A3, *_A5),
        None,
        f"in FRACTAL_NZ: {_VLLM_ASCEND}ops/fused_moe/moe_mlp.py",
    ),
    _row(
        GROUPED,
        "fp8",
        CONTIGUOUS,
        _A5,
        f"{_METHODS}w8a8fp8_dynamic.py; {_VLLM_ASCEND}device/device_op.py",
        "serving",
    ),
    _row(
        FUSED_GATE,
        "fp8",
        CONTIGUOUS,
        _A5,
        f"{_VLLM_ASCEND}device/device_op.py",
        "serving",
    ),
    *(
        _row(
            operator,
            kind,
            TRANSPOSED,
            _A5,
            f"{_METHODS}{name}.py; {_VLLM_ASCEND}device/device_op.py",
            "serving",
        )
        for kind, name in (("mxfp8", "w8a8_mxfp8"), ("mxfp4", "w4a4_mxfp4"))
        for operator in (GROUPED, FUSED_GATE)
    ),
    _row(
        GROUPED,
        "w4a8-channel",
        NZ,
        _A2_A3,
        "vllm-project/vllm-ascend #9625",
        "910B, Qwen3-30B",
    ),
    _row(
        GROUPED,
        "w4a8-channel",
        CONTIGUOUS,
        _A2_A3,
        None,
        "in FRACTAL_NZ: vllm-project/vllm-ascend #9625",
    ),
    _row(
        GROUPED,
        "w4a8-group",
        NZ,
        _A2_A3,
        f"{_METHODS}w4a8.py, until v0.26",
        "serving; removed in #13713 because it was slow",
    ),
    _row(
        GROUPED,
        "w4a8-group",
        CONTIGUOUS,
        _A2_A3,
        None,
        f"in FRACTAL_NZ: {_METHODS}w4a8.py, until v0.26",
    ),
    _row(
        GROUPED_DEQUANT,
        "w8a8",
        NZ,
        _310P,
        f"{_VLLM_ASCEND}_310p/fused_moe/moe_mlp.py",
        "serving",
    ),
    _row(
        FUSED_GATE,
        "w8a8",
        NZ,
        _A2_A3,
        f"{_OP_PLUGIN}test_npu_grouped_matmul_swiglu_quant_v2.py",
        "910B, expected values in a test of the operator",
    ),
    *(
        _row(
            FUSED_GATE,
            kind,
            layout,
            _A2_A3,
            None,
            f"shapes: {_OP_PLUGIN}test_npu_grouped_matmul_swiglu_quant_v2.py",
        )
        for kind in ("w4a8-channel", "w4a8-group")
        for layout in (NZ, CONTIGUOUS)
    ),
    _row(
        "npu_moe_init_routing_v2",
        "routing",
        ROWS,
        (*_A2_A3, *_A5),
        f"{_VLLM_ASCEND}device/device_op.py; omniai/omniinfer",
        "serving",
    ),
    _row(
        "npu_moe_init_routing_v2",
        "routing",
        ROWS,
        _310P,
        f"{_VLLM_ASCEND}_310p/fused_moe/token_dispatcher.py",
        "serving",
    ),
    _row(
        "npu_moe_token_unpermute",
        "routing",
        ROWS,
        (*_A2_A3, *_310P),
        f"{_VLLM_ASCEND}ops/fused_moe/token_dispatcher.py; DeepLink-org/dlinfer",
        "serving",
    ),
    _row("npu_moe_token_unpermute", "routing", ROWS, _A5, None),
    _row(
        "npu_moe_finalize_routing",
        "routing",
        ROWS,
        _A2_A3,
        "omniai/omniinfer",
        "serving with experts on other ranks",
    ),
    _row("npu_moe_finalize_routing", "routing", ROWS, _A5, None),
    _row(
        "npu_swiglu",
        "activation",
        ROWS,
        (*_A2_A3, *_A5),
        f"{_VLLM_ASCEND}ops/activation.py",
        "serving",
    ),
    _row(
        "npu_swiglu",
        "activation",
        ROWS,
        _310P,
        f"{_VLLM_ASCEND}_310p/fused_moe/moe_mlp.py",
        "serving",
    ),
    _row(
        "npu_trans_quant_param",
        "loading",
        ROWS,
        _A2_A3,
        f"{_OP_PLUGIN}test_npu_trans_quant_param.py",
        "910B, a test of the operator without its argument round_mode",
    ),
    _row("npu_trans_quant_param", "loading", ROWS, (*_310P, *_A5), None),
    _row(
        "npu_format_cast",
        "loading",
        CONTIGUOUS,
        tuple(Soc),
        f"{_VLLM_ASCEND}utils.py, maybe_trans_nz",
        "serving",
    ),
)


def precedent(form: Form, soc: Soc | None = None) -> Precedent | None:
    """Look up a form on a chip; None if there is no row for it.

    Args:
        form: The call.
        soc: The chip; None for the current one.

    """
    chip = soc or current_soc()
    rows = (row for row in PRECEDENTS if row.form == form and chip in row.chips)
    return next(rows, None)


def is_proven(form: Form) -> bool:
    """Whether public code is known to make a call on the current chip."""
    row = precedent(form)
    return row is not None and row.source is not None


def unproven(operator: str, kind: str, soc: Soc) -> bool:
    """Whether the default form of a call is unproven on a chip.

    Args:
        operator: Name of the operator in `torch.ops.npu`.
        kind: Kind of the call; see `Form`.
        soc: The chip.

    Returns:
        False if the chip has no row for this operator and kind.

    """
    for row in PRECEDENTS:
        if row.form[:2] == (operator, kind) and soc in row.chips:
            return row.source is None
    return False
