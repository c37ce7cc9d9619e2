# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Run the operators on an NPU and emulated, and compare the results.

    python -m tools.numerics.check_npu [--calls FILE...] [--out build/check-npu.json]

If you have a chip, please send us the report. Runs one call of each operator, and the
calls that layers of all schemes make, which `tools.numerics.record_npu_calls` has
recorded on this or another machine. `VLLM_ASCEND_CT_SOC` names the chip. Needs torch,
torch_npu and this clone, but not vLLM; calls of vllm-ascend's own operators need
vllm-ascend. Without an NPU both sides are emulated, to test this script.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from tests.ops.calls import CALLS, CALLS_310P, CALLS_A5, Call
from tools.numerics.record_npu_calls import ASCEND_OUT, OUT
from vllm_ascend_ct import compare_layouts
from vllm_ascend_ct.errors import OperatorLimitError
from vllm_ascend_ct.ops import emulated
from vllm_ascend_ct.ops.dtypes import FRACTAL_NZ
from vllm_ascend_ct.ops.emulated.registry import is_nz
from vllm_ascend_ct.ops.soc import Soc, current_soc

REPEATS = 20
# Largest relative error (norm of the difference / norm of the emulation's result), by
# dtype of the result: a few roundings.
TOLERANCES = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 1e-5}
# Share of int8 values that quantization may round to the other neighbour.
ROUNDED_OTHERWISE = 1e-2


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    files = [OUT, ASCEND_OUT] if find_spec("vllm_ascend") else [OUT]
    parser.add_argument("--calls", type=Path, nargs="*", default=files)
    parser.add_argument("--out", type=Path, default=Path("build/check-npu.json"))
    arguments = parser.parse_args()
    emulated.install()
    torch.manual_seed(0)
    own = {Soc.ASCEND_310P: CALLS_310P, Soc.A5: CALLS_A5}
    usual = CALLS | own.get(current_soc(), {})
    calls = {name: make() for name, make in usual.items()}
    for path in arguments.calls:
        if path.exists():
            calls |= recorded(path)
        else:
            print(f"No {path}: see python -m tools.numerics.record_npu_calls --help")
    device = npu_device()
    if any("." in call.operator for call in calls.values()):
        load_vllm_ascend(device)
    report = check(calls, device)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2))
    print(table(report))
    print(f"Report: {arguments.out}")
    # Only recorded calls count: a chip may lack operators of the others.
    return any(
        call["verdict"] != "equal"
        and (call["verdict"] != "not on this chip" or call["call"] not in CALLS)
        for call in report["calls"]
    )


def npu_device() -> str:
    """`npu`, or `cpu` if torch_npu or its device is missing."""
    if find_spec("torch_npu") is None:
        return "cpu"
    import torch_npu

    if not torch_npu.npu.is_available():
        return "cpu"
    compare_layouts.allow_internal_format()
    return "npu"


def load_vllm_ascend(device: str) -> None:
    """Import vllm-ascend's own operators; emulate them on the CPU."""
    if find_spec("vllm_ascend") is None:
        raise SystemExit(
            "The calls include vllm-ascend's own operators, but it is not installed."
        )
    if device != "cpu":
        from vllm_ascend.utils import enable_custom_op

        enable_custom_op()
    from tests.real_stack import custom_ops

    custom_ops.install_own()


def recorded(path: Path) -> dict[str, Call]:
    """Read a file that `tools.numerics.record_npu_calls` wrote."""

    def is_nz_mark(value: Any) -> bool:
        return isinstance(value, dict) and value.keys() == {"nz"}

    def restore(value: Any) -> Any:
        return to_nz(value["nz"]) if is_nz_mark(value) else value

    saved = torch.load(path, weights_only=True)
    soc = current_soc().value
    if saved["soc"] != soc:
        raise SystemExit(
            f"{path} has the calls for {saved['soc']}, and this is {soc}: set "
            "VLLM_ASCEND_CT_SOC, or record the calls again for this chip."
        )
    return {
        name: Call(operator, *tree_map(restore, arguments, is_leaf=is_nz_mark))
        for name, (operator, *arguments) in saved["calls"].items()
    }


def check(calls: Mapping[str, Call], device: str) -> dict[str, Any]:
    """Run all calls; return a report with the results and the environment."""
    results = [
        {"call": name, **check_call(call, device)} for name, call in calls.items()
    ]
    return {"machine": compare_layouts.machine(device), "calls": results}


def check_call(call: Call, device: str) -> dict[str, Any]:
    """Run one call on the device and emulated, and compare the results."""
    # Copy the arguments first, because either side may change them.
    args, kwargs = to_device((call.args, call.kwargs), device)
    try:
        expected, emulated_seconds = timed(
            lambda: call.function(*call.args, **call.kwargs), "cpu"
        )
    except OperatorLimitError as error:
        return {"verdict": "not on this chip", "difference": error.args[0]}
    try:
        result, seconds = timed(lambda: call.function(*args, **kwargs), device)
    except Exception as error:
        return {"verdict": "raised", "difference": f"{type(error).__name__}: {error}"}
    verdict, difference = compare(expected, tree_map_only(torch.Tensor, to_cpu, result))
    return {
        "verdict": verdict,
        "difference": difference,
        "microseconds": round(seconds * 1e6, 1),
        "emulated microseconds": round(emulated_seconds * 1e6, 1),
    }


def to_device(values: Any, device: str) -> Any:
    """Copy arguments to a device, and cast tensors marked as FRACTAL_NZ to it."""

    def move(tensor: torch.Tensor) -> torch.Tensor:
        moved = tensor.to(device, copy=True)
        return to_nz(moved) if is_nz(tensor) else moved

    return tree_map_only(torch.Tensor, move, values)


def to_nz(tensor: torch.Tensor) -> torch.Tensor:
    """Cast a contiguous tensor or a transposed view to FRACTAL_NZ."""
    if tensor.is_contiguous():
        cast: torch.Tensor = torch.ops.npu.npu_format_cast(tensor, FRACTAL_NZ)
        return cast
    return to_nz(tensor.mT).mT


def to_cpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu()


def timed(run: Callable[[], Any], device: str) -> tuple[Any, float]:
    """The result, and the median time of several runs after the first."""

    def synchronize() -> None:
        if device != "cpu":
            getattr(torch, device).synchronize()

    result = run()
    synchronize()
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        run()
        synchronize()
        times.append(time.perf_counter() - begin)
    return result, statistics.median(times)


def compare(expected: Any, result: Any) -> tuple[str, str]:
    """Compare results: `equal`, `different` or `other form`, and the difference."""
    pairs = list(zip(tree_leaves(expected), tree_leaves(result)))
    forms = [(t.dtype, tuple(t.shape)) for t in tree_leaves(expected)]
    others = [(t.dtype, tuple(t.shape)) for t in tree_leaves(result)]
    if forms != others:
        return "other form", f"emulated {forms}, here {others}"
    differences = [difference(one, other) for one, other in pairs]
    verdict = "equal" if all(equal for equal, _ in differences) else "different"
    return verdict, ", ".join(text for _, text in differences)


def difference(expected: torch.Tensor, result: torch.Tensor) -> tuple[bool, str]:
    """Whether a result is within the tolerance of its dtype, and its error."""
    one, other = expected.double(), result.double()
    # Ignore values that the NPU leaves unwritten (rows after the last expert's). The
    # emulation fills them with NaN or the smallest integer.
    if expected.is_floating_point():
        unwritten = expected.isnan()
    else:
        unwritten = expected == torch.iinfo(expected.dtype).min
    if expected.dim() > 1:
        unwritten = unwritten.all(dim=-1, keepdim=True).expand_as(expected)
    elif expected.dtype == torch.int8:
        unwritten = torch.zeros_like(unwritten)
    one, other = one[~unwritten], other[~unwritten]
    if expected.dtype == torch.int8:
        off = (one - other).abs()
        share = (off > 0).double().mean().item() if off.numel() else 0.0
        most = off.max().item() if off.numel() else 0.0
        equal = most <= 1 and share <= ROUNDED_OTHERWISE
        return equal, f"{share:.2%} of int8 off, by {most:.0f} at most"
    if not expected.is_floating_point():
        return bool(
            torch.equal(one, other)
        ), f"{(one != other).sum().item()} values off"
    error = ((one - other).norm() / one.norm().clamp(min=1e-30)).item()
    return error <= TOLERANCES[expected.dtype], f"{error:.1e}"


def table(report: dict[str, Any]) -> str:
    """Format the report as a table."""
    lines = [", ".join(f"{k} {v}" for k, v in report["machine"].items()), ""]
    lines += [
        "| call | verdict | difference | us | emulated us |",
        "|---|---|---|---|---|",
    ]
    for call in report["calls"]:
        cells = (call.get(k, "") for k in ("microseconds", "emulated microseconds"))
        texts = [call["call"], call["verdict"], call["difference"], *map(str, cells)]
        lines.append(f"| {' | '.join(texts)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
