# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Generated sections of documentation pages."""


def replace(page: str, start: str, end: str, text: str) -> str:
    """Replace what is between two marks in a page's text."""
    before, _, rest = page.partition(start)
    return before + start + text + end + rest.partition(end)[2]
