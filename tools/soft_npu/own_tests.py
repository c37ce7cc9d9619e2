# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Run vllm-ascend's own tests on software NPUs.

    python -m tools.soft_npu own-tests [--release R] [--report REPORT.md] [PATH...]

A PATH is a test file or a directory of its source distribution, by default `tests/ut`.
Each test passes, skips itself, is refused with an error that names what is not
emulated, misses a package or a file, is slow, or is wrong.
"""

import itertools
import json
import os
import stat
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tools.soft_npu import environment, foreign_tests, suite
from tools.soft_npu.environment import Device
from tools.soft_npu.foreign_tests import Suite
from tools.stacks import stacks
from tools.upstream import patch_tree

# Models of the hub, and the small one that takes its place.
MODELS = {
    "Qwen/Qwen3-0.6B": "qwen3",
    "Qwen/Qwen3-8B": "qwen3",
    "Qwen/Qwen3-30B-A3B": "qwen3-moe",
    "deepseek-ai/DeepSeek-V2": "deepseek-v2-latent-query",
    "deepseek-ai/DeepSeek-V2-Chat": "deepseek-v2-latent-query",
    "deepseek-ai/DeepSeek-V2-Lite": "deepseek-v2",
    "deepseek-ai/DeepSeek-V3.2-Exp": "deepseek-v2-latent-query",
    "meta-llama/Meta-Llama-3-8B": "llama",
}
# The tests ask for longer texts than the small models have positions for.
_LONG = {"max_position_embeddings": 40960}
# Only unit tests ask for this model, and they read its config alone.
_SPARSE = {
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "index_head_dim": 128,
    "index_n_heads": 4,
    "index_topk": 64,
}
# Directory of the tests that start engines.
_END_TO_END = "tests/e2e/"
# Parts of directories' names that ask for a chip.
CHIPS = {"310p": "310P", "a3": "A3"}
# Without this command the tests replace torch_npu by mocks.
_NPU_SMI = "#!/bin/sh\necho software NPU\n"


def run(paths: Sequence[str], release: str, report: Path | None) -> int:
    """Run tests, and print the outcomes and the reasons of failures.

    Args:
        paths: Files and directories in the source distribution.
        release: vllm-ascend release.
        report: The file to write the table and the failures to.

    Returns:
        1 if a test is wrong.

    """
    environment.set_up(release)
    suite.prepare(sorted(set(MODELS.values())))
    with tempfile.TemporaryDirectory(prefix="soft-npu-") as name:
        place = Path(name)
        root, variables = _tree(place, release), _variables(place)
        suites = (
            (suite_of(root, release, directory, variables), files)
            for directory, files in directories(root, paths)
        )
        for found in foreign_tests.run(suites):
            if report is not None:
                _write(report, f"{' '.join(paths)} of vllm-ascend {release}", found)
    return int(foreign_tests.count(found)["wrong"] > 0)


def _write(report: Path, title: str, found: patch_tree.Outcomes) -> None:
    counts = foreign_tests.describe(foreign_tests.count(found))
    table, details = foreign_tests.reasons(found), foreign_tests.details(found)
    report.write_text(f"# {title}\n\n{counts}\n\n{table}\n\n{details}\n")


def _tree(place: Path, release: str) -> Path:
    """The source distribution, with the installed package in place of its own."""
    installed = stacks.install(f"vllm_ascend-{release}")
    tree = place / "tree"
    tree.mkdir()
    for path in (installed / "source").iterdir():
        if path.name != "vllm_ascend":
            (tree / path.name).symlink_to(path)
    (tree / "vllm_ascend").symlink_to(installed / "vllm_ascend")
    return tree


def _variables(place: Path) -> dict[str, str]:
    """Variables for a hub with the small models, and the command `npu-smi`."""
    hub, commands = place / "hub", place / "bin"
    for name, small in MODELS.items():
        model = hub / f"models--{name.replace('/', '--')}"
        changes = _LONG | (_SPARSE if "V3.2" in name else {})
        _add_model(model, suite.checkpoint(small), changes)
    commands.mkdir()
    command = commands / "npu-smi"
    command.write_text(_NPU_SMI)
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    path = (str(commands), str(Path(sys.executable).parent), os.environ["PATH"])
    return {
        "HF_HUB_CACHE": str(hub),
        "HF_HUB_OFFLINE": "1",
        "PATH": os.pathsep.join(path),
        # As in vllm-ascend's own CI.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }


def _add_model(model: Path, small: Path, changes: dict[str, Any]) -> None:
    """Write what the hub's cache has of a model, with a changed config."""
    snapshot = model / "snapshots/local"
    for directory in (model / "refs", snapshot):
        directory.mkdir(parents=True)
    (model / "refs/main").write_text(snapshot.name)
    for file in small.iterdir():
        (snapshot / file.name).symlink_to(file.absolute())
    config = json.loads((small / "config.json").read_text())
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").write_text(json.dumps(config | changes))


def directories(root: Path, paths: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """The test files of each directory."""
    files: set[str] = set()
    for path in paths:
        given = root / path
        found = [given] if given.is_file() else given.rglob("test_*.py")
        files |= {str(file.relative_to(root)) for file in found}
    if not files:
        raise SystemExit(f"soft_npu: no tests in {', '.join(paths)} of vllm-ascend.")
    ordered = sorted(files, key=os.path.split)
    for directory, of_it in itertools.groupby(ordered, os.path.dirname):
        names = list(of_it)
        if directory.startswith(_END_TO_END):
            # Engines of different files do not share a process.
            yield from ((directory, [name]) for name in names)
        else:
            yield directory, names


def suite_of(
    root: Path, release: str, directory: str, variables: dict[str, str]
) -> Suite:
    """Two devices of the chip that a directory asks for.

    A test that starts engines may take as long as its file.
    """
    chips = (soc for part, soc in CHIPS.items() if part in directory)
    device = Device(release, next(chips, Device.soc), devices=2, memory="4G")
    found = Suite(root, device, variables)
    engines = directory.startswith(_END_TO_END)
    return replace(found, seconds_of_test=found.seconds) if engines else found
