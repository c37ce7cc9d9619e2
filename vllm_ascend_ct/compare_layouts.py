# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Compare the named layouts of linear layers on this chip: which is right, and fast.

    python -m vllm_ascend_ct.compare_layouts [--k 4096] [--n 4096] [--out FILE]

Lays random weights out as kernels do when they load a checkpoint, in each layout that
`ops/layouts.py` names for the chip, multiplies, and compares with float64 and with a
16-bit product. Needs what serving needs, no checkpoint and no clone. Without an NPU the
operators are emulated: the errors then are those of the emulation, the times nothing.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from vllm_ascend_ct import envs

GROUP = 128
TOKENS = (1, 16, 64, 1024)
REPEATS = 30
# Norm of the difference by that of float64: some roundings to bfloat16, and integers of
# activations that are rounded the other way. What a chip misreads is off by far more.
TOLERANCE = 2.0**-7
# Of which a layout has to be faster than the default to be proposed.
MARGIN = 0.95
_FRACTAL_NZ = 29

Product = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Result:
    """What was found of one layout.

    Attributes:
        kind: Of linear layers, as `VLLM_ASCEND_CT_LAYOUT` names it.
        layout: Its name; the first of a kind is the default.
        error: Norm of the difference from float64, by that of float64.
        is_right: Whether it is within the tolerance.
        microseconds: By number of tokens.
        ratios: Of the time of a 16-bit product.

    """

    kind: str
    layout: str
    error: float
    is_right: bool
    microseconds: dict[int, float]
    ratios: dict[int, float]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--k", type=int, default=4096, help="inputs of the layer")
    parser.add_argument("--n", type=int, default=4096, help="outputs of the layer")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--out", type=Path, default=Path("compare-layouts.json"))
    arguments = parser.parse_args()
    device = start()
    results = compare(arguments.k, arguments.n, arguments.tokens, device)
    report = {**machine(device), "k": arguments.k, "n": arguments.n}
    report["results"] = [asdict(result) for result in results]
    arguments.out.write_text(json.dumps(report, indent=2))
    print(table(results))
    is_emulated = device == "cpu"
    print("Emulated: times mean nothing." if is_emulated else advice(results))
    print(f"Report: {arguments.out}")
    return int(not all(result.is_right for result in results))


def start() -> str:
    """Make this process one that serves.

    Returns:
        The device to compute on.

    Raises:
        RuntimeError: The chip does not hold tensors in FRACTAL_NZ.

    """
    os.environ.setdefault("VLLM_PLUGINS", "ascend_ct")
    from vllm.config import VllmConfig
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    from vllm_ascend_ct import ascend_base

    if not ascend_base.serves():
        return "cpu"
    ascend_base.init_config(VllmConfig())
    import torch_npu

    # Else casts are ignored in silence; vllm-ascend's runner sets it too.
    torch_npu.npu.config.allow_internal_format = True
    weight = torch.zeros(64, 64, dtype=torch.int8, device="npu")
    cast = torch_npu.npu_format_cast(weight, _FRACTAL_NZ)
    if (found := torch_npu.get_npu_format(cast)) != _FRACTAL_NZ:
        raise RuntimeError(f"npu_format_cast to {_FRACTAL_NZ} left format {found}")
    return "npu"


def machine(device: str) -> dict[str, Any]:
    """What the results depend on."""
    from vllm_ascend_ct.ops.soc import current_soc

    chip = "emulated" if device == "cpu" else getattr(torch, device).get_device_name()
    versions = {
        name: version(name)
        for name in ("torch", "torch_npu", "vllm", "vllm_ascend", "vllm-ascend-ct")
        if find_spec(name.replace("-", "_")) is not None
    }
    return {"chip": chip, "soc": current_soc().value, **versions}


def compare(k: int, n: int, tokens: tuple[int, ...], device: str) -> list[Result]:
    """Compare each layout of the chip in use.

    Args:
        k: Inputs of the layer.
        n: Its outputs.
        tokens: Numbers of rows.
        device: Where to compute.

    """
    from vllm_ascend_ct.ops.soc import Soc, current_soc

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
            with requested(setting):
                product, formula = make(k, n, dtype, device)
            results.append(
                measured(kind, name, product, formula, rows, reference, device)
            )
    return results


def settings(kind: str) -> dict[str, str]:
    """The layouts of a kind on the chip in use, and how to ask for each."""
    from vllm_ascend_ct.ops import layouts
    from vllm_ascend_ct.ops.soc import current_soc

    choice = layouts.CHOICES[kind]
    if current_soc() in choice.chips:
        return {name: f"{kind}={name}" for name in choice.names}
    # Each chip multiplies int8 by int8; int4 those that have a choice.
    return {choice.names[0]: ""} if kind.startswith("w8a8") else {}


@contextmanager
def requested(setting: str) -> Iterator[None]:
    """Have kernels take a layout."""
    before = os.environ.pop(envs.LAYOUT, None)
    os.environ[envs.LAYOUT] = setting
    try:
        yield
    finally:
        del os.environ[envs.LAYOUT]
        if before is not None:
            os.environ[envs.LAYOUT] = before


def measured(
    kind: str,
    name: str,
    product: Product,
    formula: Product,
    rows: dict[int, torch.Tensor],
    reference: dict[int, float],
    device: str,
) -> Result:
    """Compare a product with its formula, and time it."""
    errors, times = [], {}
    for m, x in rows.items():
        on_device = x.to(device)
        expected = formula(x)
        difference = product(on_device).cpu().double() - expected
        errors.append(float(difference.norm() / expected.norm()))
        times[m] = timed(product, on_device, device)
    error = max(errors)
    # NaN is not within.
    is_right = error <= TOLERANCE
    ratios = {m: round(seconds / reference[m], 3) for m, seconds in times.items()}
    microseconds = {m: round(seconds * 1e6, 1) for m, seconds in times.items()}
    return Result(kind, name, error, is_right, microseconds, ratios)


def timed(product: Product, x: torch.Tensor, device: str) -> float:
    """Median seconds of some calls after the first."""

    def synchronize() -> None:
        if device != "cpu":
            getattr(torch, device).synchronize()

    times = []
    for _ in range(REPEATS + 1):
        synchronize()
        begin = time.perf_counter()
        product(x)
        synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def table(results: list[Result]) -> str:
    """Write the results for people; times are microseconds, with their ratios."""
    tokens = [*results[0].microseconds]
    lines = [
        f"| kind | layout | error | {' | '.join(f'{m} rows' for m in tokens)} |",
        f"|{'---|' * (len(tokens) + 3)}",
    ]
    for result in results:
        error = f"{result.error:.1e}{'' if result.is_right else ' WRONG'}"
        times = (f"{result.microseconds[m]} ({result.ratios[m]})" for m in tokens)
        cells = (result.kind, result.layout, error, *times)
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("In parentheses: time by that of a 16-bit product.")
    return "\n".join(lines)


def advice(results: list[Result]) -> str:
    """Say which layouts to take instead of defaults."""
    better = []
    for kind in dict.fromkeys(result.kind for result in results):
        default, *others = (result for result in results if result.kind == kind)
        right = [result for result in (default, *others) if result.is_right]
        if not right:
            continue
        fastest = min(right, key=_time)
        if not default.is_right or _time(fastest) < MARGIN * _time(default):
            better.append(f"{kind}={fastest.layout}")
    if not better:
        return "No other layout is right and faster than its default."
    return (
        f"Set {envs.LAYOUT}={','.join(better)}, and tell us: it should be the default."
    )


def _time(result: Result) -> float:
    """The geometric mean over numbers of rows."""
    return statistics.geometric_mean(result.ratios.values())


def _packed_int4(k: int, n: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Random weights as a checkpoint packs them, and their values `[K, N]`."""
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
    """A product by packed int4, and the weight in float64."""
    from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import (
        MPLinearLayerConfig,
    )

    from vllm_ascend_ct.kernels.linear.mixed_precision.ascend import packed_type
    from vllm_ascend_ct.kernels.parameters import set_parameter

    # Of vLLM before 0.30.
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
    input_scale = torch.tensor([4 / 127])
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
    """Activations as int8 per token holds them."""
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


if __name__ == "__main__":
    sys.exit(main())
