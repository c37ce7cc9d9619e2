# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The wheel and the source distribution, in an environment that has nothing else."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from vllm_ascend_ct import __version__

ROOT = Path(__file__).parents[2]
# Builds, and installs from a package index.
pytestmark = pytest.mark.long


def run(*command: object) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
    return subprocess.run(
        [*map(str, command)], env=clean, capture_output=True, text=True, cwd="/"
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both, of what is committed or would be: without what lies around."""
    source = tmp_path_factory.mktemp("source") / "clone"
    names = run("git", "-C", ROOT, "ls-files", "-co", "--exclude-standard").stdout
    for name in names.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    out = tmp_path_factory.mktemp("dist")
    result = run(sys.executable, "-m", "build", "--outdir", out, source)
    assert result.returncode == 0, result.stderr
    return out


def test_contents(built: Path) -> None:
    (wheel,) = built.glob(f"vllm_ascend_ct-{__version__}-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "vllm_ascend_ct/py.typed" in names
    assert {name.split("/")[0].partition("-")[0] for name in names} == {
        "vllm_ascend_ct"
    }
    (sdist,) = built.glob(f"vllm_ascend_ct-{__version__}.tar.gz")
    with tarfile.open(sdist) as archive:
        stored = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml"} <= stored


def test_without_anything_else(built: Path, tmp_path: Path) -> None:
    """Entry points are there, and the command says what is missing."""
    (wheel,) = built.glob("*.whl")
    run(sys.executable, "-m", "venv", tmp_path)
    installed = run(tmp_path / "bin/python", "-m", "pip", "install", "-q", wheel)
    assert installed.returncode == 0, installed.stderr
    command = tmp_path / "bin/vllm-ascend-ct"
    assert run(command, "--version").stdout.strip() == __version__
    entries = run(
        tmp_path / "bin/python",
        "-c",
        "from importlib.metadata import entry_points\n"
        "for kind in ('platform', 'general'):\n"
        "    for entry in entry_points(group=f'vllm.{kind}_plugins'):\n"
        "        print(kind, entry.name, callable(entry.load()))\n",
    )
    assert entries.stdout.splitlines() == [
        "platform ascend_ct True",
        "general ascend_ct True",
    ]
    found = run(command, "doctor")
    assert found.returncode == 1 and "vLLM is not installed" in found.stdout
    refused = run(command, "inspect", tmp_path)
    assert refused.returncode == 1 and "vLLM is not installed" in refused.stderr
