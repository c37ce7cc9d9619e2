# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The command `vllm-ascend-ct`."""

import argparse
import sys
from collections.abc import Sequence

from vllm_ascend_ct import __version__
from vllm_ascend_ct.cli import check_npu, doctor, inspect
from vllm_ascend_ct.cli.environment import require_vllm
from vllm_ascend_ct.errors import PlatformError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Its arguments; None for those of this process.

    Returns:
        The exit status: 0 good, 1 refused or not right, 2 wrong usage.

    """
    parser = argparse.ArgumentParser(
        prog="vllm-ascend-ct",
        description="Serve compressed-tensors models on Ascend NPUs with stock vLLM.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(dest="command", required=True)
    for command in (inspect, doctor, check_npu):
        command.add_parser(subparsers)
    arguments = parser.parse_args(argv)
    try:
        if arguments.command != "doctor":
            require_vllm()
        return int(arguments.run(arguments))
    except PlatformError as error:
        print(f"vllm-ascend-ct: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
