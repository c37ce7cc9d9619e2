# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""`vllm-ascend-ct check-npu`: which layers are right and fast on a chip."""

import argparse
from pathlib import Path
from typing import Any

# Of which all layouts take K and N, and none falls back to another.
_SIZE_STEP = 256


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "check-npu",
        help="compare quantized layers of each kind on this chip",
        description="Compare quantized layers of each kind and layout on this chip: "
        "each beside float64, and timed beside a 16-bit product. Exit status: 0 all "
        "are right, 1 one is wrong.",
    )
    parser.add_argument("--k", type=_size, default=4096, help="inputs of the layer")
    parser.add_argument("--n", type=_size, default=4096, help="outputs of the layer")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[1, 16, 64, 1024], help="rows"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("compare-layouts.json"), help="report"
    )
    parser.set_defaults(run=run)


def _size(text: str) -> int:
    size = int(text)
    if size < 1 or size % _SIZE_STEP:
        raise argparse.ArgumentTypeError(
            f"{text}: supported: multiples of {_SIZE_STEP}"
        )
    return size


def run(arguments: argparse.Namespace) -> int:
    from vllm_ascend_ct import compare_layouts

    return compare_layouts.run(
        arguments.k, arguments.n, arguments.tokens, arguments.out
    )
