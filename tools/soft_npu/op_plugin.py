# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Run op-plugin's own tests of the emulated operators on software NPUs.

    python -m tools.soft_npu op-plugin DIRECTORY

DIRECTORY is `test/test_custom_ops` of Ascend/op-plugin. Each test passes, is refused
with an error that names what is not emulated, skips itself, or is wrong.
"""

from pathlib import Path

from tools.soft_npu import foreign_tests
from tools.soft_npu.environment import Device
from tools.soft_npu.foreign_tests import Suite


def run(directory: Path, device: Device) -> int:
    """Run the test files of emulated operators, and print the outcomes.

    Args:
        directory: Directory of the tests.
        device: The software NPU; its release says whose torch_npu to use.

    Returns:
        1 if a test is wrong.

    Raises:
        SystemExit: The directory has no tests of emulated operators.

    """
    names = files(directory)
    if not names:
        raise SystemExit(f"soft_npu: {directory} has no tests of emulated operators.")
    suite = Suite(directory.resolve(), device)
    *_, found = foreign_tests.run((suite, [name]) for name in names)
    return int(foreign_tests.count(found)["wrong"] > 0)


def files(directory: Path) -> list[str]:
    """Names of the test files of emulated operators."""
    from tools.soft_npu.ops.registry import KERNELS
    from vllm_ascend_ct.ops import emulated  # noqa: F401
    from vllm_ascend_ct.ops.emulated.registry import OPERATORS

    names = {operator.name for operator in OPERATORS}
    names |= {
        name.replace("atb::_npu", "atb").rpartition("::")[2].partition(".")[0]
        for name in KERNELS
    }
    found = [f"test_{name}.py" for name in sorted(names)]
    return [name for name in found if (directory / name).exists()]
