# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Make torchvision importable where only its build for CUDA can be installed.

    python tools/stacks/torchvision.py DIRECTORY

Models with images need torchvision's Python code, and none of its compiled operators.
Without those the import fails, for it describes the shapes of two of them. Defined
without kernels, they still fail when they are called.
"""

import sys
from pathlib import Path

DEFINITIONS = """

# Added by vllm-ascend-ct's tools/stacks/torchvision.py.
if not _has_ops():
    _library = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _library.define(_name + "(Tensor boxes, Tensor scores, float iou) -> Tensor")
"""


def mend(directory: Path) -> None:
    """Define what the import needs, if a directory of packages has torchvision."""
    module = directory / "torchvision/extension.py"
    if module.exists() and DEFINITIONS not in (text := module.read_text()):
        module.write_text(text + DEFINITIONS)


if __name__ == "__main__":
    mend(Path(sys.argv[1]))
