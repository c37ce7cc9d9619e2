# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Makes a process one of the software NPU; `tools.soft_npu run` adds its folder."""

import os

if os.environ.get("SOFT_NPU_LIBRARY"):
    from tools.soft_npu import hooks

    hooks.install()
