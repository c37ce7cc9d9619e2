# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Run upstream's own linters on the files that patches change.

They are the hooks of its `.pre-commit-config.yaml` that check Python files or words, in
the versions that it names. A fault that a hook finds without the patch, too, is none.
"""

import os
import re
import shlex
import subprocess
import sys
import tarfile
import venv
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from tools.stacks import stacks
from tools.upstream.patch_series import Patch, Target
from tools.upstream.patch_tree import CACHE, git_apply, pristine

_ON_PIP = {
    "ruff-check": "ruff check",
    "ruff-format": "ruff format --check",
    "typos": "typos",
    "codespell": "codespell",
}


@dataclass(frozen=True, eq=False)
class Hook:
    """A hook that can run without pre-commit.

    Attributes:
        name: Its id.
        command: What it runs, with its arguments.
        requirements: What it needs of the package index, in an environment of its own.
        settings: As in the file.

    """

    name: str
    command: tuple[str, ...]
    requirements: tuple[str, ...]
    settings: dict[str, Any]

    def files(self, changed: Sequence[str]) -> list[str]:
        """The changed files that it checks."""
        types = {*self.settings.get("types", ()), *self.settings.get("types_or", ())}
        wanted = re.compile(self.settings.get("files", ""))
        unwanted = self.settings.get("exclude")
        return [
            file
            for file in changed
            if wanted.search(file)
            and not (unwanted and re.search(unwanted, file))
            and (file.endswith(".py") or "python" not in types)
        ]

    def run(self, tree: Path, files: Sequence[str]) -> str:
        """What it complains about; empty if nothing."""
        passed = files if self.settings.get("pass_filenames", True) else ()
        variables = dict(os.environ)
        if self.requirements:
            path = _environment(self.requirements) / "bin"
            variables["PATH"] = f"{path}{os.pathsep}{variables['PATH']}"
        result = subprocess.run(
            [*self.command, *passed],
            cwd=tree,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return result.stdout + f"exit {result.returncode}" if result.returncode else ""


def _environment(requirements: Sequence[str]) -> Path:
    """A virtual environment with some packages, made once."""
    contents = "\n".join(requirements)

    def make(directory: Path) -> None:
        print(f"patch_lint: installing {', '.join(requirements)}", flush=True)
        venv.create(directory, with_pip=True)
        python = str(directory / "bin/python")
        command = [python, "-m", "pip", "install", "--quiet"]
        subprocess.run([*command, *requirements], check=True)

    name = requirements[0].replace("=", "-")
    return stacks.once(CACHE / "linters" / name, contents, make)


def hooks(tree: Path) -> tuple[list[Hook], list[str]]:
    """The hooks of a tree that can run, and the ids of the others."""
    config = yaml.safe_load((tree / ".pre-commit-config.yaml").read_text())
    can_run, others = [], []
    for repository in config["repos"]:
        for settings in repository["hooks"]:
            name, needed = settings["id"], settings.get("additional_dependencies", ())
            entry = _ON_PIP.get(name, settings.get("entry", ""))
            words = [*shlex.split(entry), *settings.get("args", ())]
            if name in _ON_PIP:
                version = repository["rev"].removeprefix("v")
                needed = [f"{words[0]}=={version}"]
                if words[0] == "ruff":
                    settings["types"] = ["python"]
            elif not re.match(r"python3? tools/\S+\.py", entry):
                if settings.get("types") != ["python"]:
                    others.append(name)
                    continue
                words.insert(0, "bash")
            elif not any("==" in requirement for requirement in needed):
                # This environment has them.
                words[0], needed = sys.executable, ()
            words = [word for word in words if word != "--fix"]
            can_run.append(Hook(name, tuple(words), tuple(needed), settings))
    return can_run, others


def repository(target: Target, version: str) -> Path:
    """A git repository with all files of a source distribution, made once."""
    pristine(target, version)
    name = f"{target.project.replace('-', '_')}-{version}"

    def make(directory: Path) -> None:
        with tarfile.open(CACHE / f"{name}.tar.gz") as tar:
            members = [m for m in tar.getmembers() if "/" in m.name]
            for member in members:
                member.name = member.name.partition("/")[2]
            tar.extractall(directory, members, filter="data")
        _git(directory, "init", "--quiet")
        _commit(directory)

    return stacks.once(CACHE / f"{name}-lint", target.versions[version], make)


def _git(tree: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=lint", "-c", "user.email=noreply@localhost")
    subprocess.run(["git", *identity, *arguments], cwd=tree, check=True)


def _commit(tree: Path) -> None:
    _git(tree, "add", "--all", "--force")
    _git(tree, "commit", "--quiet", "--allow-empty", "--message", "without the patch")


def lint(target: Target, version: str, patches: Sequence[Patch]) -> Iterator[str]:
    """Yield what upstream's linters complain about with a patch only."""
    tree = repository(target, version)
    can_run, others = hooks(tree)
    for patch in patches:
        _git(tree, "reset", "--quiet", "--hard", _first(tree))
        *before, last = [target.file(p, version) for p in target.needed(patch)]
        if before:
            git_apply(tree, before)
            _commit(tree)
        old = [_complaints(tree, hook, patch) for hook in can_run]
        if complaint := git_apply(tree, [last]):
            yield f"{patch.name}: {complaint}"
            continue
        # As they are run before a commit.
        _git(tree, "add", "--all")
        clean = []
        for hook, earlier in zip(can_run, old):
            complaints = _complaints(tree, hook, patch)
            if new := complaints and complaints - (earlier or Counter()):
                yield f"{patch.name}: {hook.name} on v{version}:\n" + "\n".join(new)
            elif complaints is not None:
                clean.append(hook.name)
        print(f"v{version} {patch.name}: {', '.join(clean)}", flush=True)
    print(f"v{version}: not run: {', '.join(others)}", flush=True)


def _complaints(tree: Path, hook: Hook, patch: Patch) -> Counter[str] | None:
    """What a hook says about the files of a patch that exist; None if it checks none.

    Without numbers of lines, and of complaints.
    """
    files = [file for file in hook.files(patch.files) if (tree / file).exists()]
    if not files:
        return None
    lines = hook.run(tree, files).splitlines()
    return Counter(re.sub(r":\d+|\b\d+ (?=error|file|source)", "", x) for x in lines)


def _first(tree: Path) -> str:
    command = ["git", "rev-list", "--max-parents=0", "HEAD"]
    result = subprocess.run(
        command, cwd=tree, stdout=subprocess.PIPE, text=True, check=True
    )
    return result.stdout.strip()
