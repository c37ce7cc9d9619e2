# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Run vllm-ascend's unmodified engine on a machine without an NPU.

    python -m tools.soft_npu run [options] -- vllm serve CHECKPOINT
    python -m tools.soft_npu run [options] -- python -m tools.soft_npu.serve OUT RUN
    python -m tools.soft_npu test [--release R] [pytest arguments]
    python -m tools.soft_npu set-up [--release R]
    python -m tools.soft_npu stand-ins
    python -m tools.soft_npu op-plugin DIRECTORY [--release R] [--soc 310P]
    python -m tools.soft_npu own-tests [--release R] [--report REPORT.md] [PATH...]

`run` gives a command and its child processes software NPUs: the real torch_npu with a
runtime that uses the host's memory and computes on the CPU. Dependencies are downloaded
and compiled once. For a release of vllm-ascend that is not known yet, `--vllm` names
the vLLM release that it is made for, and `VLLM_ASCEND_CT_ANY_RELEASE` must be 1.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from tools.soft_npu import covered, environment, op_plugin, own_tests, stand_ins, suite
from tools.soft_npu.environment import Device
from tools.stacks import stacks


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = parser.add_subparsers(dest="action", required=True)
    run = actions.add_parser("run", help="a command on software NPUs")
    make = actions.add_parser("set-up", help="download and compile only")
    actions.add_parser("stand-ins", help="list the stand-ins")
    operators = actions.add_parser("op-plugin", help="run op-plugin's own tests")
    operators.add_argument("directory", type=Path, help="its test/test_custom_ops")
    own = actions.add_parser("own-tests", help="run vllm-ascend's own tests")
    own.add_argument("paths", nargs="*", metavar="PATH", default=["tests/ut"])
    own.add_argument("--report", type=Path, help="write the failures to it")
    test = actions.add_parser("test", help="run tests/soft_npu; the rest is pytest's")
    default = Device()
    for action in (run, make, test, operators, own):
        # By default `test` runs on all releases that are tested end to end.
        known = None if action is test else default.release
        action.add_argument("--release", default=known, help="vllm-ascend release")
        action.add_argument("--vllm", help="vLLM of an unknown release")
    for action in (run, operators):
        action.add_argument("--soc", choices=environment.SOCS, default=default.soc)
    run.add_argument("--devices", type=int, default=default.devices)
    run.add_argument("--memory", default=default.memory, help="of each device, like 8G")
    run.add_argument(
        "--fault",
        action="append",
        default=[],
        metavar="KIND[:NAME]@N",
        help="allocate, operator or hang: the N-th fails; with a +, all from there on",
    )
    run.add_argument(
        "--coverage",
        type=Path,
        metavar="REPORT",
        help="report the functions of vllm-ascend and the operators that ran",
    )
    run.add_argument("--verbose", action="store_true", help="print the stand-ins")
    run.add_argument("command", nargs=argparse.REMAINDER)
    arguments, others = parser.parse_known_args()
    if others and arguments.action != "test":
        parser.error(f"unknown arguments: {' '.join(others)}")
    _check_release(parser, arguments)
    if arguments.action == "set-up":
        environment.set_up(arguments.release)
    if arguments.action == "stand-ins" or getattr(arguments, "verbose", False):
        print("\n".join(stand_ins.describe()))
    if arguments.action == "test":
        sys.exit(suite.test(others, arguments.release))
    if arguments.action == "op-plugin":
        device = Device(arguments.release, arguments.soc, memory="8G")
        sys.exit(op_plugin.run(arguments.directory, device))
    if arguments.action == "own-tests":
        sys.exit(own_tests.run(arguments.paths, arguments.release, arguments.report))
    if arguments.action == "run":
        sys.exit(_run(arguments))


def _check_release(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace
) -> None:
    """Add a release that is not known yet; require `--vllm` for it."""
    release = getattr(arguments, "release", None)
    if release is None or release in stacks.STACKS:
        return
    if arguments.vllm is None:
        parser.error(f"--release {release} is not known: add --vllm RELEASE")
    stacks.add_release(release, arguments.vllm)


def _run(arguments: argparse.Namespace) -> int:
    device = Device(
        arguments.release,
        arguments.soc,
        arguments.devices,
        arguments.memory,
        ",".join(arguments.fault),
    )
    command = arguments.command
    if command[:1] == ["--"]:
        command = command[1:]
    if not command:
        raise SystemExit("soft_npu: no command. Name one after `--`.")
    with tempfile.TemporaryDirectory(prefix="soft-npu-") as state:
        variables = environment.variables(device, Path(state))
        if arguments.coverage:
            environment.add_packages(variables, "coverage")
            variables[covered.VARIABLE] = state
        code = subprocess.run(command, env=variables).returncode
        if arguments.coverage:
            covered.report(Path(state), arguments.coverage)
    return code


if __name__ == "__main__":
    main()
