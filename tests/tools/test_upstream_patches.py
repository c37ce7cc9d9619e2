# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The patches as files; `upstream_patches verify` checks the rest."""

import argparse
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from pytest_mock import MockerFixture

from tools.upstream import patch_lint, patch_series, patch_tree, upstream_patches
from tools.upstream.patch_series import Patch, Target, targets

TARGETS = targets()
PATCHES = [(target, patch) for target in TARGETS for patch in target.patches]

SECTIONS = ["## Overview", "## Validation"]
MAIL = """From 0000000000000000000000000000000000000000 Mon Sep 17 00:00:00 2001
From: vllm-ascend-ct <noreply@localhost>
Date: Fri, 2 Jan 2026 00:00:00 +0000
Subject: [PATCH] [Kernel] Do something

## Overview

Why.

## Validation

#12 is not a heading.

Upstream-Status: Pending
Base: v1.0.0
Duplicate-Check: 2026-01-02 "something" ->
 none
Needed-By: nothing
Fails-Without: tests/a.py::test -> message
Remove-When: it is there
Last-Verified: 2026-01-02 v1.0.0
---
 vllm/a.py | 2 +-

diff --git a/vllm/a.py b/vllm/a.py
--- a/vllm/a.py
+++ b/vllm/a.py
@@ -1 +1,2 @@
-old
+new
+newer
"""


@pytest.fixture
def staged(tmp_path: Path) -> tuple[Target, Patch]:
    (tmp_path / "a.patch").write_text(MAIL)
    (tmp_path / "series").write_text("# comment\na.patch\n")
    versions = {"1.0.0": ""}
    target = Target(tmp_path, "vllm", "1.0.0", versions, "vllm", [], [], [], SECTIONS)
    return target, target.patches[0]


def test_there_are_some() -> None:
    assert {target.project for target in TARGETS} == {"vllm", "vllm-ascend"}
    assert len(PATCHES) > 8


@pytest.mark.parametrize(
    ("target", "patch"), PATCHES, ids=lambda v: getattr(v, "name", "")
)
def test_headers(target: Target, patch: Patch) -> None:
    assert patch.faults(target) == []


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.project)
def test_all_are_in_the_series(target: Target) -> None:
    assert target.stray_files() == []
    assert target.base in target.versions


def test_table_is_of_now() -> None:
    """If this fails, run `tools.upstream.upstream_patches status --write`."""
    readme = upstream_patches.README.read_text()
    assert upstream_patches.with_tables(readme) == readme


def test_a_patch_is_read(staged: tuple[Target, Patch]) -> None:
    target, patch = staged
    assert patch.faults(target) == []
    assert patch.subject == "[Kernel] Do something"
    assert patch.values("Duplicate-Check") == ['2026-01-02 "something" -> none']
    assert patch.files == ["vllm/a.py"]
    assert patch.source_lines == (2, 1) and patch.removable_lines == 0


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("[Kernel] Do", "do", "subject"),
        ("vllm-ascend-ct <no", "somebody <no", "from somebody"),
        ("## Overview\n\n", "", "sections"),
        ("## Validation", "## Tests", "sections"),
        ("Upstream-Status: Pending\n", "", "Upstream-Status is missing"),
        ("Pending", "Sent", "Upstream-Status: Sent"),
        ("Base: v1.0.0", "Base: v0.9.0", "Base is not v1.0.0"),
        ("Needed-By: nothing", "Needed-By: README.md::f", "Needed-By"),
        ("Needed-By: nothing", "Needed-By: tools/stacks/ranks.py::no", "KeyError"),
        ("tests/a.py::test -> m", "tests/a.py::test m", "Fails-Without"),
        ("Base", "Depends-On: b.patch\nBase", "b.patch is not in the series"),
        ("Base", "Reviewed-By: nobody\nBase", "Reviewed-By is no trailer"),
        ("+newer\n", "+newer\n" * 200, "lines of source"),
        ("2026-01-02 v1.0.0\n---", "2026-01-02 v0.9.0\n---", "Last-Verified is not of"),
    ],
)
def test_faults(staged: tuple[Target, Patch], old: str, new: str, fault: str) -> None:
    target, patch = staged
    patch.path.write_text(MAIL.replace(old, new, 1))
    assert any(fault in found for found in patch.faults(target))


def test_an_editor_keeps_headings(
    staged: tuple[Target, Patch], mocker: MockerFixture
) -> None:
    """`git commit` takes lines for comments once an editor has seen them."""
    target, patch = staged
    out = target.directory / "out"
    body = patch.body

    def apply(
        target: Target, version: str, patches: Sequence[Patch], out: Path
    ) -> None:
        (out / "vllm").mkdir(parents=True)
        (out / "vllm/a.py").write_text("old\n")

    mocker.patch.object(upstream_patches, "target_of", return_value=target)
    mocker.patch.object(patch_tree, "apply", apply)
    arguments = argparse.Namespace(project="vllm", version=None, out=out)
    upstream_patches.edit(arguments)
    who = [
        "-c",
        "user.name=a",
        "-c",
        "user.email=a@localhost",
        "-c",
        "core.editor=true",
    ]
    subprocess.run(["git", *who, "commit", "--quiet", "--amend"], cwd=out, check=True)
    upstream_patches.refresh(arguments)
    assert Patch(patch.path).body == body


HOOKS = """
repos:
- repo: local
  hooks:
  - {id: check-words, entry: python tools/check.py, types: [python]}
  - {id: check-docs, entry: python tools/check.py, files: ^docs/}
  - {id: gitleaks, entry: gitleaks.sh}
"""
# Complains about words, and says in which line.
CHECK = """
import sys
lines = enumerate(open(sys.argv[1]), 1)
found = [f"a.py:{i}: {x.strip()}" for i, x in lines if x.strip() in ("bad", "newer")]
print("\\n".join(found), f"Found {len(found)} errors", sep="\\n")
sys.exit(bool(found))
"""


@pytest.mark.parametrize("word", ["newer", "fine"])
def test_linters(
    staged: tuple[Target, Patch], mocker: MockerFixture, word: str
) -> None:
    """Only what a linter says with the patch, and not without it, is a fault."""
    target, patch = staged
    mail = MAIL.replace("1 +1,2", "1,2 +1,3").replace("+newer", f"+{word}\n bad")
    patch.path.write_text(mail)
    tree = target.directory / "tree"
    files = {"vllm/a.py": "old\nbad\n", "tools/check.py": CHECK}
    for name, text in {**files, ".pre-commit-config.yaml": HOOKS}.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
    patch_lint._git(tree, "init", "--quiet")
    patch_lint._commit(tree)
    mocker.patch.object(patch_lint, "repository", return_value=tree)
    faults = list(patch_lint.lint(target, target.base, [patch]))
    expected = "a.patch: check-words on v1.0.0:\na.py: newer"
    assert faults == ([expected] if word == "newer" else [])


def test_a_stray_file_is_found(staged: tuple[Target, Patch]) -> None:
    target, _ = staged
    (target.directory / "b.patch").write_text(MAIL)
    assert target.stray_files() == ["b.patch"]


def test_lines_are_counted() -> None:
    place = "tools/upstream/patch_series.py::Patch.header"
    assert 2 < patch_series.lines_of(place) < 10
    assert patch_series.lines_of("nothing") == 0
