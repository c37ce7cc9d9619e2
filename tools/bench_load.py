# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Time and memory of what happens to a layer's weight after loading.

    python -m tools.bench_load [--k 4096 --n 11008] [--json]

Each route is timed against a plain copy of the same packed bytes in the same run; only
the ratios mean anything. Memory counts tensors made on the way, over the packed bytes.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

from tools.memory import TensorMemory
from vllm_ascend_ct.ops import emulated
from vllm_ascend_ct.weights import int_quantized, pack_quantized

GROUP_SIZE = 128
ROUNDS = 5


@dataclass
class Result:
    """One route.

    Attributes:
        seconds: Median over the rounds.
        copies: `seconds` over those of copying the packed bytes.
        peak: Most bytes alive at once beyond the input, over the packed bytes.
        resident: Bytes that stay beyond the input's, over the packed bytes.

    """

    route: str
    seconds: float
    copies: float
    peak: float
    resident: float


def measure(
    route: str, make: Callable[[], torch.Tensor], run: Callable[[torch.Tensor], object]
) -> Result:
    """Run `run` on fresh inputs and compare it with copying the input."""
    times, copy_times = [], []
    for _ in range(ROUNDS):
        packed = make()
        target = torch.zeros_like(packed)
        start = time.perf_counter()
        target.copy_(packed)
        copy_times.append(time.perf_counter() - start)
        start = time.perf_counter()
        run(packed)
        times.append(time.perf_counter() - start)
    packed = make()
    with TensorMemory() as memory:
        kept = run(packed)
    bytes_packed = packed.numel() * packed.element_size()
    seconds = statistics.median(times)
    result = Result(
        route,
        seconds,
        seconds / statistics.median(copy_times),
        memory.peak / bytes_packed,
        memory.current / bytes_packed,
    )
    del kept
    return result


def routes(k: int, n: int) -> list[Result]:
    """Measure every layout, and how else int4 weights are brought to the NPU."""
    scale = torch.rand(n, k // GROUP_SIZE).bfloat16()
    channel_scale = torch.rand(n)
    zero_points = torch.randint(0, 2**31, (n // 8, k // GROUP_SIZE), dtype=torch.int32)

    def packed(bits: int) -> Callable[[], torch.Tensor]:
        words = k * bits // 32
        return lambda: torch.randint(-(2**31), 2**31, (n, words), dtype=torch.int32)

    def int8() -> torch.Tensor:
        return torch.randint(-128, 128, (n, k), dtype=torch.int8)

    def repack(weight: torch.Tensor) -> torch.Tensor:
        values = unpack_from_int32(weight, 4, torch.Size((n, k)))
        return torch.ops.npu.npu_convert_weight_to_int4pack(
            values.t().contiguous().int()
        )

    def asymmetric(weight: torch.Tensor) -> object:
        offset = pack_quantized.to_npu_offset(zero_points, scale, 4)
        return pack_quantized.to_npu_weight(weight, 4), offset

    def static(weight: torch.Tensor) -> object:
        zero_point = torch.tensor([3], dtype=torch.int32)
        return int_quantized.int32_bias(weight, zero_point, None, channel_scale)

    return [
        measure("w4a16", packed(4), lambda w: pack_quantized.to_npu_weight(w, 4)),
        measure("w4a16, unpack-transpose-pack", packed(4), repack),
        measure("w4a16 asymmetric, with offsets", packed(4), asymmetric),
        measure("w8a16", packed(8), lambda w: pack_quantized.to_npu_weight(w, 8)),
        measure("w8a8 dynamic", int8, lambda w: w.t()),
        measure("w8a8 dynamic asymmetric", int8, int_quantized.weight_sum),
        measure("w8a8 static asymmetric", int8, static),
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
        "peak/packed  resident/packed"
    )
    for r in results:
        print(
            f"{r.route:34}  {r.seconds:7.4f}  {r.copies:6.1f}  {r.peak:11.3f}  "
            f"{r.resident:15.3f}"
        )


if __name__ == "__main__":
    main()
