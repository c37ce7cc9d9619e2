# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Sets up software NPUs in a process; `tools.soft_npu run` adds this directory."""

import os

if os.environ.get("SOFT_NPU_LIBRARY"):
    from tools.soft_npu import hooks

    hooks.install()
