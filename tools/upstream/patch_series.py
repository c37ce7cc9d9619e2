# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Read the staged patches, and check their headers and trailers."""

import ast
import hashlib
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from email import message_from_bytes
from email.policy import default
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[2]
PATCHES = ROOT / "upstream_patches"

# Trailer -> pattern of its value, and whether it is optional.
_DATE = r"\d{4}-\d\d-\d\d"
_VERSION = r"v\d+\.\d+\.\d+(rc\d+)?"
TRAILERS = {
    "Upstream-Status": (
        r"Pending( \[waits for .+\])?|Submitted \[https://\S+\]"
        r"|Backport \[v\S+ \w+\]|Denied \[https://\S+\]|Inappropriate \[.+\]"
        r"|Inactive-Upstream",
        True,
    ),
    "Base": (_VERSION, True),
    "Depends-On": (r"[\w-]+\.patch", False),
    "Duplicate-Check": (rf'{_DATE} ".+" -> .+', True),
    "Needed-By": (r"nothing\b.*|\S+\.py::\S+", True),
    "Fails-Without": (r"tests/\S+ -> .+", True),
    "Remove-When": (r".+", True),
    "Last-Verified": (rf"{_DATE}( {_VERSION})+", True),
}
AUTHOR = "vllm-ascend-ct <noreply@localhost>"
_TITLE = re.compile(r"(\[[\w ]+\])+ [A-Z].+")
MAX_SOURCE_LINES = 150


@dataclass(frozen=True)
class Target:
    """A project that has staged patches: a directory with `BASE` and `series`.

    Attributes:
        directory: Directory of the patches.
        project: Name of the distribution.
        base: Version that the patches are made against.
        versions: sha256 of the source distribution, by version.
        package: Name of the Python package.
        generated: Files of the package that its build creates.
        requirements: Packages that its tests import and this environment lacks.
        neighbours: Tests whose results no patch may change.
        sections: Headings that the text of a pull request has, in this order.
        stack: Stack of `tools.stacks.real_stack` that its tests run on; empty for vLLM
            on CPU.

    """

    directory: Path
    project: str
    base: str
    versions: dict[str, str]
    package: str
    generated: list[str]
    requirements: list[str]
    neighbours: list[str]
    sections: list[str]
    stack: str = ""

    @cached_property
    def patches(self) -> list["Patch"]:
        """The patches in their order."""
        lines = (self.directory / "series").read_text().splitlines()
        names = [line.strip() for line in lines if line.split("#")[0].strip()]
        return [Patch(self.directory / name) for name in names]

    def file(self, patch: "Patch", version: str) -> Path:
        """The patch's file for a version: its backport if there is one."""
        backport = self.directory / "backports" / version / patch.name
        return backport if backport.exists() else patch.path

    def digest(self, version: str) -> str:
        """The sha256 of everything that affects upstream's tests of a version."""
        files = [self.directory / "BASE", self.directory / "series"]
        files += [self.file(patch, version) for patch in self.patches]
        texts = b"".join(path.read_bytes() for path in files)
        return hashlib.sha256(texts).hexdigest()

    @property
    def verified(self) -> dict[str, str]:
        """Digests for which upstream's tests passed, by version."""
        path = self.directory / "VERIFIED"
        lines = path.read_text().splitlines() if path.exists() else []
        return dict(line.split() for line in lines)

    def write_verified(self) -> None:
        """Record that upstream's tests passed."""
        lines = [f"{version} {self.digest(version)}\n" for version in self.versions]
        (self.directory / "VERIFIED").write_text("".join(lines))

    def needed(self, patch: "Patch") -> list["Patch"]:
        """The patches that a patch depends on, followed by the patch."""
        if not patch.path.exists():
            return [patch]
        others = [p for p in self.patches if p.name in patch.values("Depends-On")]
        return [q for p in others for q in self.needed(p)] + [patch]

    def stray_files(self) -> list[str]:
        """Patches that are not in the series."""
        listed = {patch.name for patch in self.patches}
        found = self.directory.rglob("*.patch")
        return sorted(
            str(path.relative_to(self.directory))
            for path in found
            if path.name not in listed
        )


@dataclass(frozen=True)
class Patch:
    """A `git format-patch` mail whose body ends with trailers."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    def header(self, name: str) -> str:
        """A header of the mail."""
        return str(message_from_bytes(self.path.read_bytes(), policy=default)[name])

    @cached_property
    def subject(self) -> str:
        return self.header("subject").removeprefix("[PATCH] ")

    @cached_property
    def body(self) -> str:
        text = self.path.read_text().partition("\n\n")[2]
        return text.partition("\n---\n")[0]

    @cached_property
    def trailers(self) -> list[tuple[str, str]]:
        """Names and values in order; a line that begins with a space continues one."""
        last = self.body.rstrip().rpartition("\n\n")[2]
        unfolded = re.sub(r"\n\s+", " ", last)
        pairs = (line.partition(": ") for line in unfolded.splitlines())
        return [(name, value) for name, _, value in pairs]

    def values(self, name: str) -> list[str]:
        """All values of a trailer."""
        return [value for found, value in self.trailers if found == name]

    def faults(self, target: Target) -> list[str]:
        """What is wrong with the header."""
        faults = []
        if not _TITLE.fullmatch(self.subject):
            faults.append(f"subject {self.subject!r}; expected [Tag] and a title")
        if (author := self.header("from")) != AUTHOR:
            faults.append(f"from {author}; expected {AUTHOR}")
        headings = re.findall(r"^#+ .+", self.body, re.M)
        if headings != target.sections:
            faults.append(f"sections {headings}; expected {target.sections}")
        for name, (pattern, required) in TRAILERS.items():
            values = self.values(name)
            if required and not values:
                faults.append(f"{name} is missing")
            faults += [
                f"{name}: {value}; expected {pattern}"
                for value in values
                if not re.fullmatch(pattern, value)
            ]
        faults += [
            f"{name} is no trailer" for name, _ in self.trailers if name not in TRAILERS
        ]
        if self.values("Base") != [f"v{target.base}"]:
            faults.append(f"Base is not v{target.base}")
        verified = self.values("Last-Verified")
        if verified and set(verified[0].split()[1:]) != {
            f"v{v}" for v in target.versions
        }:
            faults.append(f"Last-Verified is not of {', '.join(target.versions)}")
        known = {patch.name for patch in target.patches}
        faults += [
            f"Depends-On: {name} is not in the series"
            for name in self.values("Depends-On")
            if name not in known
        ]
        added, removed = self.source_lines
        if added + removed > MAX_SOURCE_LINES:
            faults.append(
                f"{added + removed} lines of source; at most {MAX_SOURCE_LINES}"
            )
        return [*faults, *self._needed_by_faults()]

    def _needed_by_faults(self) -> Iterator[str]:
        for place in self.values("Needed-By"):
            try:
                lines_of(place)
            except (OSError, KeyError, SyntaxError) as error:
                yield f"Needed-By: {place}: {error!r}"

    @cached_property
    def files(self) -> list[str]:
        """The files that the patch changes."""
        return re.findall(r"^diff --git a/(\S+) b/", self.path.read_text(), re.M)

    @property
    def source_lines(self) -> tuple[int, int]:
        """Lines added and removed, not counting tests and documentation."""
        added = removed = 0
        for part in self.path.read_text().split("\ndiff --git a/")[1:]:
            if part.startswith(("tests/", "docs/", ".buildkite/")):
                continue
            hunks = part.partition("\n@@")[2].splitlines()
            added += sum(line.startswith("+") for line in hunks)
            removed += sum(line.startswith("-") for line in hunks)
        return added, removed

    @property
    def removable_lines(self) -> int:
        """Lines of this package that can be removed once the patch is released."""
        return sum(lines_of(place) for place in self.values("Needed-By"))


def lines_of(place: str) -> int:
    """Number of lines of `path.py::Class.method`; 0 for an empty name."""
    path, _, name = place.partition("::")
    if not name:
        return 0
    nodes: dict[str, ast.stmt] = {}

    def visit(parent: ast.AST, prefix: str) -> None:
        for node in ast.iter_child_nodes(parent):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                nodes[prefix + node.name] = node
                visit(node, f"{prefix}{node.name}.")

    visit(ast.parse((ROOT / path).read_text()), "")
    node = nodes[name]
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def targets() -> list[Target]:
    """All projects that have staged patches."""
    return [
        Target(path.parent, **tomllib.loads(path.read_text()))
        for path in sorted(PATCHES.glob("*/BASE"))
    ]


def target_of(project: str) -> Target:
    """The target of a project."""
    (target,) = (target for target in targets() if target.project == project)
    return target
