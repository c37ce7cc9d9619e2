# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Imports only point down the layers, and importing the package is cheap."""

import ast
from pathlib import Path

import pytest

from tests.plugin.fresh import run_ok

PACKAGE = Path(__file__).parents[1] / "vllm_ascend_ct"
# From the bottom up. A layer may import itself and the layers before it.
LAYERS = ["errors", "envs", "releases", "compat", "ops", "weights", "ascend_base"]
LAYERS += ["kernels", "fused_moe", "quantization", "register", "platforms"]
LAYERS += ["compare_layouts", "cli"]
# Packages that a layer must not import.
FORBIDDEN = {
    "ops": ("vllm", "compressed_tensors", "vllm_ascend"),
    "weights": ("vllm", "vllm_ascend"),
    "envs": ("torch",),
    "errors": ("torch", "vllm"),
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Modules that a file imports anywhere."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {
                node.module or "",
                *(f"{node.module}.{a.name}" for a in node.names),
            }
    return found


def layer_of(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] == PACKAGE.name and len(parts) > 1 and parts[1] in LAYERS:
        return parts[1]
    return None


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    relative = path.relative_to(PACKAGE).with_suffix("")
    if relative.name == "__init__" and relative.parent == Path():
        return
    layer = relative.parts[0]
    assert layer in LAYERS, f"{layer} has no place among the layers"
    for module in imports(path):
        target = layer_of(module)
        if target is not None:
            assert LAYERS.index(target) <= LAYERS.index(layer), f"{layer} -> {module}"
        assert module.split(".")[0] not in FORBIDDEN.get(layer, ()), module


def test_kernel_functions_know_no_layers() -> None:
    """Functions for other quantization tools need only torch; so does `ops/`."""
    for path in ("kernels/linear/functional.py", "fused_moe/functional.py"):
        modules = {m for m in imports(PACKAGE / path) if layer_of(m) != "ops"}
        roots = {module.split(".")[0] for module in modules}
        assert roots - {"collections", "typing"} == {"torch"}


def test_importing_the_package_imports_nothing_heavy() -> None:
    out = run_ok(
        """
import sys
import vllm_ascend_ct
print([name for name in ("torch", "vllm", "transformers") if name in sys.modules])
"""
    )
    assert out == "[]"
