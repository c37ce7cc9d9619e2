# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The chip that vllm-ascend was installed for."""


def set_chip(name: str) -> None:
    """Set another chip than the wheel's, before anything else of it is imported."""
    from vllm_ascend import _build_info

    _build_info.__device_type__ = f"_{name}" if name[0].isdigit() else name
