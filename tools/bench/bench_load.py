# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Measure time and memory of repacking a linear layer's weight after loading.

    python -m tools.bench.bench_load [--k 4096 --n 11008] [--json]

Times a kernel's processing of a layer, relative to copying the packed bytes in the same
run; compare only ratios. Memory counts the tensors that the dispatcher sees, not
temporary memory inside torch's operators.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from vllm.model_executor.kernels.linear import (
    Int8ScaledMMLinearLayerConfig,
    MPLinearLayerConfig,
)
from vllm.scalar_type import ScalarType, scalar_types

from tools.bench.launches import Launches
from tools.bench.memory import TensorMemory
from vllm_ascend_ct.kernels.linear.mixed_precision.ascend import (
    AscendWNA16LinearKernel,
)
from vllm_ascend_ct.kernels.linear.mixed_precision.ascend_wna8 import (
    AscendWNA8LinearKernel,
)
from vllm_ascend_ct.kernels.linear.scaled_mm.ascend import (
    AscendInt8ScaledMMLinearKernel,
)
from vllm_ascend_ct.ops import emulated
from vllm_ascend_ct.weights.float_quantized import dequantize

GROUP_SIZE = 128
ROUNDS = 5


@dataclass
class Result:
    """Measurements of one way to process a weight.

    Attributes:
        route: Name of that way.
        seconds: Median over the rounds.
        copies: `seconds` divided by the time to copy the packed bytes.
        peak: Peak memory in addition to the input, divided by the packed bytes.
        resident: Memory that stays in use in addition to the input, divided by the
            packed bytes.
        launches: Number of operators that a device would launch in one forward.

    """

    route: str
    seconds: float
    copies: float
    peak: float
    resident: float
    launches: int | None


def measure(
    route: str,
    packed_bytes: int,
    make: Callable[[], Any],
    run: Callable[[Any], object],
    forward: Callable[[Any], object] | None = None,
) -> Result:
    """Run `run` on the result of `make`, and compare it with copying `packed_bytes`."""
    times, copy_times = [], []
    source = torch.zeros(packed_bytes, dtype=torch.int8)
    target = torch.zeros_like(source)
    for _ in range(ROUNDS):
        start = time.perf_counter()
        target.copy_(source)
        copy_times.append(time.perf_counter() - start)
        made = make()
        start = time.perf_counter()
        run(made)
        times.append(time.perf_counter() - start)
    made = make()
    with TensorMemory(_held(made)) as memory:
        kept = run(made)
    launches = None
    if forward is not None:
        with Launches() as counted:
            forward(made)
        launches = len(counted.names)
    seconds = statistics.median(times)
    result = Result(
        route,
        seconds,
        seconds / statistics.median(copy_times),
        memory.peak / packed_bytes,
        memory.current / packed_bytes,
        launches,
    )
    del kept
    return result


def _held(made: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of an input: a layer, a kernel with its layer, or experts."""
    for part in made if isinstance(made, tuple) else (made,):
        if isinstance(part, torch.Tensor):
            yield part
            continue
        layer = getattr(part, "layer", part)
        if isinstance(layer, torch.nn.Module):
            yield from layer.parameters()


def parameters(**tensors: torch.Tensor) -> torch.nn.Module:
    """Make a module with the parameters of a loaded layer."""
    layer = torch.nn.Module()
    for name, tensor in tensors.items():
        layer.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
    return layer


def packed_weight(bits: int, k: int, n: int) -> torch.Tensor:
    """Make a random packed weight; every word holds valid values."""
    return torch.randint(-(2**31), 2**31, (n, k * bits // 32), dtype=torch.int32)


def forward_of(kernel: Any, k: int) -> Callable[[Any], object]:
    """Make a function that runs one token through a layer, without bias."""
    x = torch.randn(1, k).bfloat16()
    return lambda layer: kernel.apply_weights(layer, x)


def mixed_precision(
    route: str,
    kernel_class: type[AscendWNA16LinearKernel] | type[AscendWNA8LinearKernel],
    weight_type: ScalarType,
    sizes: tuple[int, int],
    group_size: int = GROUP_SIZE,
) -> Result:
    """Measure how a mixed-precision kernel processes a layer."""
    k, n = sizes
    bits = weight_type.size_bits
    asymmetric = not weight_type.has_bias() and not weight_type.is_signed()
    config = MPLinearLayerConfig(
        full_weight_shape=(k, n),
        partition_weight_shape=(k, n),
        weight_type=weight_type,
        act_type=torch.bfloat16,
        group_size=group_size,
        zero_points=asymmetric,
    )
    kernel = kernel_class(config, "weight", "scale", "zero_point")
    groups = 1 if group_size == -1 else k // group_size
    # The type int4 is stored with one value per int8.
    on_disk = 8 if weight_type == scalar_types.int4 else bits

    def make() -> torch.nn.Module:
        if weight_type == scalar_types.int4:
            weight = torch.randint(-8, 8, (n, k), dtype=torch.int8)
        else:
            weight = packed_weight(bits, k, n)
        return parameters(
            weight=weight,
            scale=torch.rand(n, groups).bfloat16(),
            zero_point=packed_weight(bits, n, groups).t().contiguous(),
        )

    run = kernel.process_weights_after_loading
    return measure(route, k * n * on_disk // 8, make, run, forward_of(kernel, k))


def int8(k: int, n: int, static: bool, asymmetric: bool) -> Result:
    """Measure how the int8 kernel processes a layer."""
    names = ["weight", "scale", "input_scale", "input_zero_point", "azp_adj"]
    config = Int8ScaledMMLinearLayerConfig(
        is_static_input_scheme=static,
        is_channelwise=True,
        input_symmetric=not asymmetric,
    )
    kernel = AscendInt8ScaledMMLinearKernel(config, names)

    def make() -> torch.nn.Module:
        layer: Any = parameters(
            weight=torch.randint(-128, 128, (n, k), dtype=torch.int8),
            scale=torch.rand(n, 1),
            input_scale=torch.rand(1),
            input_zero_point=torch.ones(1, dtype=torch.int8),
        )
        layer.params_dtype = torch.bfloat16
        return layer

    kind = "static" if static else "dynamic"
    route = f"w8a8-channel-{kind}{'-asym' if asymmetric else ''}"
    run = kernel.process_weights_after_loading
    return measure(route, k * n, make, run, forward_of(kernel, k))


def unpack_transpose_pack(k: int, n: int) -> Result:
    """Measure the usual way to repack int4 weights: unpack, transpose and pack."""

    def run(weight: torch.Tensor) -> torch.Tensor:
        values = unpack_from_int32(weight, 4, torch.Size((n, k)))
        widened = values.t().contiguous().int()
        packed: torch.Tensor = torch.ops.npu.npu_convert_weight_to_int4pack(widened)
        return packed

    def make() -> torch.Tensor:
        return packed_weight(4, k, n)

    return measure("w4a16, unpack-transpose-pack", k * n // 2, make, run)


def resolved(route: str, k: int, n: int, bits: int, block: tuple[int, int]) -> Result:
    """Measure how a floating-point weight is resolved to 16 bits.

    The 16-bit weight is allocated before, and the checkpoint's tensors are not kept.
    """

    def make() -> Any:
        codes = torch.randint(0, 120, (n, k * bits // 8), dtype=torch.uint8)
        scale = torch.rand(-(-n // block[0]), -(-k // block[1]))
        stored = codes if bits == 4 else codes.view(torch.float8_e4m3fn)
        return stored, scale, torch.zeros(n, k, dtype=torch.bfloat16)

    def run(made: Any) -> None:
        stored, scale, weight = made
        made_of = stored, scale, block, None, weight.dtype, weight.device
        weight.copy_(dequantize(*made_of))

    return measure(route, k * n * bits // 8, make, run)


def routes(k: int, n: int) -> list[Result]:
    """Measure every scheme."""
    a16, a8, sizes = AscendWNA16LinearKernel, AscendWNA8LinearKernel, (k, n)
    types = scalar_types
    return [
        mixed_precision("w4a16-g128", a16, types.uint4b8, sizes),
        unpack_transpose_pack(k, n),
        mixed_precision("w4a16-channel", a16, types.uint4b8, sizes, -1),
        mixed_precision("w4a16-g128-asym", a16, types.uint4, sizes),
        mixed_precision("w8a16-g128", a16, types.uint8b128, sizes),
        mixed_precision("w8a16-g128-asym", a16, types.uint8, sizes),
        *(
            int8(k, n, static, asymmetric)
            for static, asymmetric in product((False, True), repeat=2)
        ),
        mixed_precision("w2a16-g128", a16, types.uint2b2, sizes),
        mixed_precision("w3a16-g128", a16, types.uint3b4, sizes),
        mixed_precision("w5a16-g128", a16, types.uint5b16, sizes),
        mixed_precision("w6a16-g128-asym", a16, types.uint6, sizes),
        mixed_precision("w7a16-g128", a16, types.uint7b64, sizes),
        mixed_precision("w4a8-channel", a8, types.int4, sizes, -1),
        mixed_precision("w4a8-channel-packed", a8, types.uint4b8, sizes, -1),
        mixed_precision("w4a8-g256-packed", a8, types.uint4b8, sizes, 256),
        mixed_precision("w4a8-g128 as w4a16", a16, types.int4, sizes),
        mixed_precision("w3a8-channel-packed", a8, types.uint3b4, sizes, -1),
        mixed_precision("w6a8-channel-packed", a8, types.uint6b32, sizes, -1),
        mixed_precision("w8a8-channel-packed", a8, types.uint8b128, sizes, -1),
        resolved("fp8-channel to bf16", k, n, 8, (1, k)),
        resolved("fp8-block to bf16", k, n, 8, (128, 128)),
        resolved("mxfp8 to bf16", k, n, 8, (1, 32)),
        resolved("nvfp4 to bf16", k, n, 4, (1, 16)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--k", type=int, default=4096, help="input features")
    parser.add_argument("--n", type=int, default=11008, help="output features")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    emulated.install()
    results = routes(arguments.k, arguments.n)
    if arguments.json:
        print(json.dumps([asdict(result) for result in results], indent=2))
        return
    print(
        f"{'K x N = ' + f'{arguments.k} x {arguments.n}':34}  seconds  x copy  "
        "peak/packed  resident/packed  launches"
    )
    for r in results:
        print(
            f"{r.route:34}  {r.seconds:7.4f}  {r.copies:6.1f}  {r.peak:11.3f}  "
            f"{r.resident:15.3f}  {r.launches or '':>8}"
        )


if __name__ == "__main__":
    main()
