# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Compare the named layouts of linear layers on this chip for accuracy and speed.

    vllm-ascend-ct check-npu [--k 4096] [--n 4096] [--out FILE]

Repacks random weights as the kernels do when they load a checkpoint, into each layout
that `ops/layouts.py` names for the chip. Multiplies by them, and compares the results
with float64 and the times with a 16-bit matmul. Times are measured in a captured graph,
as engines run; the weight may stay in the chip's cache. Needs the same installation as
serving, but no checkpoint and no clone of the repository. Without an NPU the operators
are emulated, and the times say nothing about an NPU.
"""

import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from vllm_ascend_ct import envs
from vllm_ascend_ct.errors import PlatformError
from vllm_ascend_ct.ops import layouts
from vllm_ascend_ct.ops.dtypes import FRACTAL_NZ
from vllm_ascend_ct.ops.soc import Soc, current_soc

GROUP = 128
CALLS, ROUNDS = 20, 5
# Largest relative error (norm of the difference / norm of the float64 result) of a
# correct layout. Covers a few roundings to bfloat16, and quantized activations that the
# chip rounds to the other neighbour. A misread weight is off by far more.
TOLERANCE = 2.0**-7
# A layout is recommended if its time and its error are at most these multiples of the
# default layout's.
MAX_TIME, MAX_ERROR = 0.95, 1.5
# Its reciprocal rounds to bfloat16 with an error of 0.1 %, like a typical random scale.
INPUT_SCALE = 1 / 27.03

Product = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Result:
    """Measurements of one layout.

    Attributes:
        kind: Kind of linear layer, as in `VLLM_ASCEND_CT_LAYOUT`.
        layout: Name of the layout; the first one of a kind is the default.
        fault: The error it raised, or "wrong"; None if its results are correct.
        error: Norm of the difference from float64, divided by the norm of the float64
            result; None if the layout raised an error or a result is not finite.
        microseconds: Time of one call, by number of tokens.
        ratios: Time divided by that of a 16-bit matmul, by number of tokens.

    """

    kind: str
    layout: str
    fault: str | None = None
    error: float | None = None
    microseconds: dict[int, float] = field(default_factory=dict)
    ratios: dict[int, float] = field(default_factory=dict)


def run(k: int, n: int, tokens: Sequence[int], out: Path) -> int:
    """Measure all layouts, print the results and write a report.

    Args:
        k: Input features of the layers.
        n: Output features of the layers.
        tokens: Numbers of tokens to multiply at once.
        out: The file to write.

    Returns:
        1 if a layout is wrong, otherwise 0.

    """
    device = start()
    results = compare(k, n, tokens, device)
    print(table(results))
    print(advice(results, device))
    report = {**machine(device), "k": k, "n": n}
    report["results"] = [asdict(result) for result in results]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2))
    print(f"Report: {out}")
    return int(any(result.fault for result in results))


def start() -> str:
    """Set this process up like a serving process.

    Returns:
        The device to compute on, "cpu" or "npu".

    Raises:
        PlatformError: This package does not support this host.

    """
    os.environ.setdefault("VLLM_PLUGINS", "ascend_ct")
    from vllm.config import VllmConfig

    from vllm_ascend_ct import ascend_base
    from vllm_ascend_ct.register import register

    register()
    if not ascend_base.runs_on_vllm_ascend():
        return "cpu"
    # Kernels read vllm-ascend's settings for the memory format of weights.
    ascend_base.init_config(VllmConfig())
    allow_internal_format()
    return "npu"


def allow_internal_format() -> None:
    """Enable casts to FRACTAL_NZ, which torch_npu silently ignores by default.

    vllm-ascend's model runner sets the same option.

    Raises:
        PlatformError: A cast has no effect even so.

    """
    import torch_npu

    torch_npu.npu.config.allow_internal_format = True
    weight = torch.zeros(64, 64, dtype=torch.int8, device="npu")
    found = torch_npu.get_npu_format(torch_npu.npu_format_cast(weight, FRACTAL_NZ))
    if found != FRACTAL_NZ:
        raise PlatformError(
            "Casts to FRACTAL_NZ have no effect on this chip",
            where=f"npu_format_cast(weight, {FRACTAL_NZ}) left format {found}",
            supported="a torch_npu in which npu.config.allow_internal_format works",
            remedy="Report it with the versions of torch_npu and CANN; until it is "
            "fixed, serve with vllm-ascend's weight_nz_mode=0",
        )


def machine(device: str) -> dict[str, Any]:
    """Chip and package versions, for the report."""
    found = {"device": device, "chip": "emulated", "soc": current_soc().value}
    if device != "cpu":
        backend = getattr(torch, device)
        found["chip"] = backend.get_device_name()
        for module in ("CANN", "DRIVER"):
            found[module] = str(backend.utils.get_cann_version(module))
    found["python"] = platform.python_version()
    for name in ("torch", "torch_npu", "vllm", "vllm_ascend", "vllm-ascend-ct"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


def compare(k: int, n: int, tokens: Sequence[int], device: str) -> list[Result]:
    """Measure each layout of the current chip.

    Args:
        k: Input features of the layer.
        n: Output features of the layer.
        tokens: Numbers of tokens to multiply at once.
        device: The device to compute on.

    """
    is_310p = current_soc() is Soc.ASCEND_310P
    dtype = torch.float16 if is_310p else torch.bfloat16
    torch.manual_seed(0)
    rows = {m: torch.randn(m, k).to(dtype) for m in tokens}
    dense = torch.randn(n, k).to(dtype).to(device)
    linear = partial(torch.nn.functional.linear, weight=dense)
    reference = {m: timed(linear, x.to(device), device) for m, x in rows.items()}
    results = []
    for kind, make in _LAYERS.items():
        for name, setting in settings(kind).items():
            torch.manual_seed(1)
            try:
                with requested(setting):
                    product, formula = make(k, n, dtype, device)
                result = measured(product, formula, rows, reference, device)
            except Exception as error:
                # The chip may reject an unproven layout; go on with the others.
                result = {"fault": f"{type(error).__name__}: {error}"}
            results.append(Result(kind, name, **result))
    return results


def settings(kind: str) -> dict[str, str]:
    """Layouts of a kind on the current chip, and the setting that requests each."""
    choice = layouts.CHOICES[kind]
    if current_soc() in choice.chips:
        return {name: f"{kind}={name}" for name in choice.names}
    # Every chip multiplies int8 by int8; only the chips listed in `CHOICES` take int4.
    return {choice.names[0]: ""} if kind.startswith("w8a8") else {}


@contextmanager
def requested(setting: str) -> Iterator[None]:
    """Set `VLLM_ASCEND_CT_LAYOUT` within the context."""
    before = os.environ.get(envs.LAYOUT)
    os.environ[envs.LAYOUT] = setting
    try:
        yield
    finally:
        if before is None:
            del os.environ[envs.LAYOUT]
        else:
            os.environ[envs.LAYOUT] = before


def measured(
    product: Product,
    formula: Product,
    rows: dict[int, torch.Tensor],
    reference: dict[int, float],
    device: str,
) -> dict[str, Any]:
    """Compare a product with its formula, and time it.

    Args:
        product: Multiplies `[tokens, K]` on the device.
        formula: Computes the same on the host in float64.
        rows: Inputs `[tokens, K]` on the host, by number of tokens.
        reference: Seconds of the 16-bit matmul, by number of tokens.
        device: The device to compute on.

    Returns:
        Fields of a `Result`.

    """
    errors, times = [], {}
    for m, x in rows.items():
        on_device, expected = x.to(device), formula(x)
        difference = product(on_device).cpu().double() - expected
        errors.append(float(difference.norm() / expected.norm()))
        times[m] = timed(product, on_device, device)
    # NaN compares false.
    is_right = all(error <= TOLERANCE for error in errors)
    return {
        "fault": None if is_right else "wrong",
        "error": max(errors) if all(map(math.isfinite, errors)) else None,
        "microseconds": {m: round(x * 1e6, 1) for m, x in times.items()},
        "ratios": {m: round(x / reference[m], 3) for m, x in times.items()},
    }


def timed(product: Product, x: torch.Tensor, device: str) -> float:
    """Time one call of a product.

    Args:
        product: Multiplies `x`.
        x: `[tokens, K]` on the device.
        device: The device to compute on.

    Returns:
        Seconds. On the NPU the median of several replays of a captured graph, per call;
        on the CPU the time of a single call.

    """
    if device == "cpu":
        begin = time.perf_counter()
        product(x)
        return time.perf_counter() - begin
    backend = getattr(torch, device)
    product(x)
    backend.synchronize()
    graph = backend.NPUGraph()
    with backend.graph(graph):
        for _ in range(CALLS):
            product(x)
    times = []
    for _ in range(ROUNDS + 1):
        backend.synchronize()
        begin = time.perf_counter()
        graph.replay()
        backend.synchronize()
        times.append((time.perf_counter() - begin) / CALLS)
    return statistics.median(times[1:])


def table(results: Sequence[Result]) -> str:
    """Format the results as a Markdown table; times are in microseconds."""
    tokens = next((list(r.microseconds) for r in results if r.microseconds), [])
    lines = [
        f"| kind | layout | error | {' | '.join(f'{m} rows' for m in tokens)} |",
        f"|{'---|' * (len(tokens) + 3)}",
    ]
    for result in results:
        error = "" if result.error is None else f"{result.error:.1e} "
        cells = [result.kind, result.layout, f"{error}{result.fault or ''}".strip()]
        for m in tokens:
            time_of = result.microseconds.get(m, "")
            cells.append(f"{time_of} ({result.ratios[m]})" if time_of else "")
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("In parentheses: time divided by that of a 16-bit matmul.")
    return "\n".join(lines)


def advice(results: Sequence[Result], device: str) -> str:
    """Say which layouts to request instead of the defaults, and what not to serve.

    Args:
        results: Results of all layouts; the first one of each kind is the default.
        device: The device they were measured on.

    """
    lines, better = [], []
    for kind in dict.fromkeys(result.kind for result in results):
        default, *others = (result for result in results if result.kind == kind)
        right = [result for result in others if not result.fault]
        if default.fault and not right:
            lines.append(
                f"{kind}: no layout gives correct results; do not serve such layers on "
                "this chip."
            )
            continue
        fast = [other for other in right if _is_better(other, default)]
        if fast and (default.fault or device != "cpu"):
            better.append(f"{kind}={min(fast, key=_time).layout}")
    if better:
        lines.append(f"Better than the default: {envs.LAYOUT}={','.join(better)}")
    if device == "cpu":
        lines.append("The operators are emulated: ignore the times.")
    elif not lines:
        lines.append("Every default is correct, and no other layout is faster.")
    if device != "cpu":
        lines.append("Please send us the report.")
    return "\n".join(lines)


def _is_better(other: Result, default: Result) -> bool:
    if default.fault or default.error is None:
        return True
    is_as_right = other.error is not None and other.error <= MAX_ERROR * default.error
    return is_as_right and _time(other) < MAX_TIME * _time(default)


def _time(result: Result) -> float:
    """Geometric mean of the time ratios over the numbers of tokens."""
    return statistics.geometric_mean(result.ratios.values())


def _packed_int4(k: int, n: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Random int4 weights as a checkpoint packs them, and their values `[K, N]`."""
    values = torch.randint(0, 16, (n, k // 8, 8))
    packed = (values << torch.arange(0, 32, 4)).sum(2).to(torch.int32)
    return packed.to(device), values.view(n, k).t().double() - 8


def _mixed_precision(
    kernel_class: Any,
    group_size: int,
    k: int,
    n: int,
    dtype: torch.dtype,
    device: str,
) -> tuple[Product, torch.Tensor]:
    """A matmul by a packed int4 weight, and that weight in float64 `[K, N]`."""
    from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import (
        MPLinearLayerConfig,
    )

    from vllm_ascend_ct.kernels.linear.mixed_precision.ascend import packed_type
    from vllm_ascend_ct.kernels.parameters import set_parameter

    # A field of vLLM before 0.30.
    others: Any = {"has_g_idx": False}
    names = {field.name for field in fields(MPLinearLayerConfig)}
    config = MPLinearLayerConfig(
        full_weight_shape=(k, n),
        partition_weight_shape=(k, n),
        weight_type=packed_type(4, True),
        act_type=dtype,
        group_size=group_size,
        zero_points=False,
        **{name: value for name, value in others.items() if name in names},
    )
    groups = 1 if group_size == -1 else k // group_size
    scale = (torch.rand(n, groups) / 100 + 0.01).to(dtype)
    packed, values = _packed_int4(k, n, device)
    layer: Any = torch.nn.Module()
    set_parameter(layer, "weight_packed", packed)
    set_parameter(layer, "weight_scale", scale.to(device))
    serves, reason = kernel_class.can_implement(config)
    if not serves:
        raise ValueError(reason)
    kernel = kernel_class(config, "weight_packed", "weight_scale")
    kernel.process_weights_after_loading(layer)
    weight = values * scale.t().double().repeat_interleave(k // groups, 0)
    return lambda x: kernel.apply_weights(layer, x), weight


def _w4a16(k: int, n: int, dtype: torch.dtype, device: str) -> tuple[Product, Product]:
    from vllm_ascend_ct.kernels.linear.mixed_precision.ascend import (
        AscendWNA16LinearKernel,
    )

    product, weight = _mixed_precision(
        AscendWNA16LinearKernel, GROUP, k, n, dtype, device
    )
    return product, lambda x: x.double() @ weight


def _w4a8(k: int, n: int, dtype: torch.dtype, device: str) -> tuple[Product, Product]:
    from vllm_ascend_ct.kernels.linear.mixed_precision.ascend_wna8 import (
        AscendWNA8LinearKernel,
    )

    product, weight = _mixed_precision(AscendWNA8LinearKernel, -1, k, n, dtype, device)
    return product, lambda x: _dynamic(x) @ weight


def _int8(
    is_static: bool, k: int, n: int, dtype: torch.dtype, device: str
) -> tuple[Product, Product]:
    from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import (
        Int8ScaledMMLinearLayerConfig,
    )

    from vllm_ascend_ct.kernels.linear.scaled_mm.ascend import (
        AscendInt8ScaledMMLinearKernel,
    )
    from vllm_ascend_ct.kernels.parameters import set_parameter

    config = Int8ScaledMMLinearLayerConfig(
        is_channelwise=True, is_static_input_scheme=is_static, input_symmetric=True
    )
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    scale = torch.rand(n, 1) / 1000 + 0.001
    input_scale = torch.tensor([INPUT_SCALE])
    layer: Any = torch.nn.Module()
    layer.params_dtype = dtype
    set_parameter(layer, "weight", weight.to(device))
    set_parameter(layer, "weight_scale", scale.to(device))
    given = input_scale.to(device) if is_static else None
    set_parameter(layer, "input_scale", given)
    for name in ("input_zero_point", "azp_adj"):
        set_parameter(layer, name, None)
    names = ("weight", "weight_scale", "input_scale", "input_zero_point", "azp_adj")
    kernel = AscendInt8ScaledMMLinearKernel(config, names)
    kernel.process_weights_after_loading(layer)
    exact = weight.t().double() * scale.t().double()

    def formula(x: torch.Tensor) -> torch.Tensor:
        if not is_static:
            return _dynamic(x) @ exact
        step = input_scale.double()
        return (x.double() / step).round().clamp(-128, 127) * step @ exact

    return lambda x: kernel.apply_weights(layer, x), formula


def _dynamic(x: torch.Tensor) -> torch.Tensor:
    """Round activations `[M, K]` to their int8 per-token grid, in float64."""
    values = x.double()
    step = values.abs().amax(1, keepdim=True) / 127
    return (values / step).round() * step


def _w8a8_dynamic(
    k: int, n: int, dtype: torch.dtype, device: str
) -> tuple[Product, Product]:
    return _int8(False, k, n, dtype, device)


def _w8a8_static(
    k: int, n: int, dtype: torch.dtype, device: str
) -> tuple[Product, Product]:
    return _int8(True, k, n, dtype, device)


_LAYERS = {
    "w4a16-group": _w4a16,
    "w4a8-channel": _w4a8,
    "w8a8-dynamic": _w8a8_dynamic,
    "w8a8-static": _w8a8_static,
}
