# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Report which functions of vllm-ascend ran, and which operators they called.

    python -m tools.soft_npu run --coverage REPORT.md -- COMMAND

Each process of the command writes its data when it ends. A process that is killed
writes nothing, so the report states the number of processes.
"""

import atexit
import json
import os
import sys
from collections import Counter
from pathlib import Path

VARIABLE = "SOFT_NPU_COVERAGE"
PACKAGE = "vllm_ascend"


def start(directory: str) -> None:
    """Measure this process from now on; write the data to a directory at exit."""
    import coverage

    measured = coverage.Coverage(
        data_file=str(Path(directory) / "lines"),
        data_suffix=True,
        source_pkgs=[PACKAGE],
        messages=False,
    )
    measured.set_option("run:disable_warnings", ["no-data-collected"])

    def stop() -> None:
        from tools.soft_npu.serve import operators

        measured.stop()
        measured.save()
        counts = Path(directory) / f"operators-{os.getpid()}.json"
        counts.write_text(json.dumps(operators()))

    measured.start()
    atexit.register(stop)


def report(directory: Path, out: Path) -> None:
    """Write the report as Markdown.

    Args:
        directory: Directory with the processes' data.
        out: The file to write.

    """
    from tools.soft_npu import stand_ins
    from tools.stacks import stacks

    sys.path.append(str(stacks.install("coverage")))
    processes = sorted(directory.glob("operators-*.json"))
    called: Counter[str] = Counter()
    for path in processes:
        called.update(json.loads(path.read_text()))
    ran = functions(directory)
    total = sum(len(names) for names, _ in ran.values())
    everything = sum(count for _, count in ran.values())
    lines = [
        f"# What {len(processes)} processes ran of {PACKAGE}",
        f"{total} of {everything} functions, in "
        f"{sum(bool(names) for names, _ in ran.values())} of {len(ran)} files.",
        "\n## Functions",
        *(
            f"- `{path}`: {len(names)} of {count}: {', '.join(names)}"
            for path, (names, count) in ran.items()
            if names
        ),
        "\n## Files of which none ran",
        *(f"- `{path}`: {count}" for path, (names, count) in ran.items() if not names),
        "\n## Calls of operators",
        *(f"- `{name}`: {count}" for name, count in called.most_common()),
        "\n## What stood in",
        *(f"- {line}" for line in stand_ins.describe()),
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(lines) + "\n")
    print(f"soft_npu: {lines[0].strip('# ')}: {lines[1]} Report: {out}")


def functions(directory: Path) -> dict[str, tuple[list[str], int]]:
    """The functions that ran, for each file that has functions.

    Returns:
        By path in the package, the names of the functions that ran, and the number of
        all functions.

    """
    import coverage

    measured = coverage.Coverage(data_file=str(directory / "lines"), messages=False)
    measured.combine()
    found = directory / "report.json"
    measured.json_report(outfile=str(found), ignore_errors=True)
    ran = {}
    for path, of_file in json.loads(found.read_text())["files"].items():
        # The empty name stands for the module's own lines.
        summaries = {name: x["summary"] for name, x in of_file["functions"].items()}
        summaries.pop("", None)
        names = [name for name, x in summaries.items() if x["covered_lines"]]
        if summaries:
            _, _, short = path.rpartition(f"{PACKAGE}/")
            ran[short] = names, len(summaries)
    return dict(sorted(ran.items()))
