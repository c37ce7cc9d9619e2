# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Compare the layers of each kind on this chip for accuracy and speed.

    vllm-ascend-ct check-npu [--k 4096] [--n 4096] [--out FILE]

Makes a linear layer of each kind that the chip serves, in each layout that
`ops/layouts.py` names, and a layer of each kind of routed experts. Repacks random
weights as the kernels do when they load a checkpoint. Compares the results with float64
and the times with a 16-bit product, and says which operator calls have a precedent on
such a chip (`ops/precedents.py`). Times are measured in a captured graph,
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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from vllm_ascend_ct import envs
from vllm_ascend_ct.compare_layouts import experts
from vllm_ascend_ct.compare_layouts.layer import Layer, NotServed, Product, Sizes
from vllm_ascend_ct.compare_layouts.linear import LINEAR
from vllm_ascend_ct.errors import PlatformError
from vllm_ascend_ct.ops import layouts
from vllm_ascend_ct.ops.dtypes import FRACTAL_NZ
from vllm_ascend_ct.ops.precedents import Form, precedent
from vllm_ascend_ct.ops.soc import Soc, current_soc

CALLS, ROUNDS = 20, 5
# Experts' intermediate size is a multiple of it: two of the largest groups.
GROUPS = 512
# Largest relative error (norm of the difference / norm of the float64 result) of a
# correct layout. Covers a few roundings to bfloat16, and quantized activations that the
# chip rounds to the other neighbour. A misread weight is off by far more.
TOLERANCE = 2.0**-7
# Experts round twice as often.
EXPERTS_TOLERANCE = 2 * TOLERANCE
# A layout is recommended if its time and its error are at most these multiples of the
# default layout's.
MAX_TIME, MAX_ERROR = 0.95, 1.5


@dataclass(frozen=True)
class Result:
    """Measurements of one layout.

    Attributes:
        kind: Kind of layer, as in `VLLM_ASCEND_CT_LAYOUT` if there is a choice.
        layout: Name of the layout; the first one of a kind is the default. Empty if
            there is no choice.
        fault: The error it raised, or "wrong"; None if its results are correct.
        error: Norm of the difference from float64, divided by the norm of the float64
            result; None if the layout raised an error or a result is not finite.
        microseconds: Time of one call, by number of tokens.
        ratios: Time divided by that of a 16-bit product, by number of tokens.
        calls: The operator calls that multiply and quantize, each with the code that
            is known to make it on such a chip; None if the call is unproven.

    """

    kind: str
    layout: str
    fault: str | None = None
    error: float | None = None
    microseconds: dict[int, float] = field(default_factory=dict)
    ratios: dict[int, float] = field(default_factory=dict)
    calls: dict[str, str | None] = field(default_factory=dict)


def run(k: int, n: int, tokens: Sequence[int], out: Path) -> int:
    """Measure all layouts, print the results and write a report.

    Args:
        k: Input features of linear layers, hidden size of experts.
        n: Output features of linear layers. The intermediate size of experts is a
            quarter of it, in whole groups.
        tokens: Numbers of tokens to multiply at once.
        out: The file to write.

    Returns:
        1 if a layout is wrong, otherwise 0.

    """
    device = start()
    # Upstream's constructors of kernels read a config.
    from vllm.config import VllmConfig, set_current_vllm_config

    with set_current_vllm_config(VllmConfig()):
        results = compare(k, n, tokens, device)
    if not results:
        raise RuntimeError("no layer was compared")
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
    linear = Sizes(k, n, dtype, device)
    dense = torch.randn(n, k).to(dtype).to(device)
    width = max(n // 4 // GROUPS, 1) * GROUPS
    routed = Sizes(k, width, dtype, device)
    results = []
    for sizes, makers, product, tolerance in (
        (linear, LINEAR, lambda x: torch.nn.functional.linear(x, dense), TOLERANCE),
        (routed, experts.ROUTED, experts.reference(routed), EXPERTS_TOLERANCE),
    ):
        times = {m: timed(product, x.to(device), device) for m, x in rows.items()}
        for kind, make in makers.items():
            for name, setting in settings(kind).items():
                torch.manual_seed(1)
                try:
                    with requested(setting):
                        layer = make(sizes)
                    found = measured(layer, rows, times, device, tolerance)
                except NotServed:
                    continue
                except Exception as error:
                    # The chip may reject an unproven call; go on with the others.
                    found = {"fault": f"{type(error).__name__}: {error}"}
                results.append(Result(kind, name, **found))
    return results


def settings(kind: str) -> dict[str, str]:
    """Layouts of a kind on the current chip, and the setting that requests each."""
    choice = layouts.CHOICES.get(kind)
    if choice is None or current_soc() not in choice.chips:
        return {"": ""}
    return {name: f"{kind}={name}" for name in choice.names}


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
    layer: Layer,
    rows: dict[int, torch.Tensor],
    reference: dict[int, float],
    device: str,
    tolerance: float = TOLERANCE,
) -> dict[str, Any]:
    """Compare a layer with its formula, and time it.

    Args:
        layer: The layer.
        rows: Inputs `[tokens, K]` on the host, by number of tokens.
        reference: Seconds of the 16-bit product, by number of tokens.
        device: The device to compute on.
        tolerance: Largest relative error of a correct result.

    Returns:
        Fields of a `Result`.

    """
    errors, times = [], {}
    for m, x in rows.items():
        on_device, expected = x.to(device), layer.formula(x)
        difference = layer.product(on_device).cpu().double() - expected
        errors.append(float(difference.norm() / expected.norm()))
        times[m] = timed(layer.product, on_device, device)
    # NaN compares false.
    is_right = all(error <= tolerance for error in errors)
    return {
        "fault": None if is_right else "wrong",
        "error": max(errors) if all(map(math.isfinite, errors)) else None,
        "microseconds": {m: round(x * 1e6, 1) for m, x in times.items()},
        "ratios": {m: round(x / reference[m], 3) for m, x in times.items()},
        "calls": {call(form): _source(form) for form in layer.forms},
    }


def call(form: Form) -> str:
    return f"{form.operator} ({form.kind}, {form.layout})"


def _source(form: Form) -> str | None:
    row = precedent(form)
    return None if row is None else row.source


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
    columns = ["kind", "layout", "error", *(f"{m} rows" for m in tokens), "calls"]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for result in results:
        error = "" if result.error is None else f"{result.error:.1e} "
        cells = [result.kind, result.layout, f"{error}{result.fault or ''}".strip()]
        for m in tokens:
            time_of = result.microseconds.get(m, "")
            cells.append(f"{time_of} ({result.ratios[m]})" if time_of else "")
        marked = (f"{name}{'' if s else ' *'}" for name, s in result.calls.items())
        lines.append(f"| {' | '.join((*cells, ', '.join(marked)))} |")
    lines.append("In parentheses: time divided by that of a 16-bit product.")
    lines.append("* Unproven: no public code is known to make this call on this chip.")
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
