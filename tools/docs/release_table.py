# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Write the table of releases into docs/.

python -m tools.docs.release_table
"""

from pathlib import Path

from tools.docs import section
from vllm_ascend_ct.releases import TABLE, Release

PAGE = Path(__file__).parents[2] / "docs" / "releases.md"
START, END = (
    "<!-- releases: tools/docs/release_table.py -->\n",
    "<!-- end of releases -->\n",
)
HEADER = (
    "| vLLM | vllm-ascend | torch_npu | compressed-tensors | tested |\n"
    "| --- | --- | --- | --- | --- |\n"
)


def _line(release: Release) -> str:
    cells = (
        release.vllm,
        ", ".join(release.vllm_ascend) or "emulated",
        release.torch_npu,
        release.compressed_tensors,
        f"{release.tested}: {release.note}",
    )
    return f"| {' | '.join(cells)} |\n"


def with_table(page: str) -> str:
    """Replace the table in the page's text."""
    table = HEADER + "".join(map(_line, TABLE))
    return section.replace(page, START, END, table)


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
