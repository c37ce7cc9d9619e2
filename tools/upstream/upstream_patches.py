# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Check and maintain the pull requests staged in `upstream_patches/`.

    python -m tools.upstream.upstream_patches verify [--changed] [PATCH...]
    python -m tools.upstream.upstream_patches lint [PATCH...]
    python -m tools.upstream.upstream_patches test [pytest arguments]
    python -m tools.upstream.upstream_patches apply OUT [--version V] [PATCH...]
    python -m tools.upstream.upstream_patches edit OUT [--version V]
    python -m tools.upstream.upstream_patches refresh OUT [--version V]
    python -m tools.upstream.upstream_patches status [--write]
    python -m tools.upstream.upstream_patches drop

`verify` checks the headers; that the patches apply, alone and together, and compile;
that upstream's linters find nothing in them; that each patch's tests fail without it
for the stated reason and pass with it; and that the results of neighbouring tests do
not change. It then records the digest of the series in VERIFIED; with --changed it runs
upstream's linters and tests only if the digest is new. `lint` runs only the linters,
those of upstream's `.pre-commit-config.yaml`. `test` runs this project's own suite on
patched vLLM. `apply` makes a patched copy of the source tree. `edit` makes a git
repository with one commit per patch, and `refresh` writes changed commits back to the
patches. `status` prints the table for the README; --write updates it there. `drop`
names patches that a release already contains.
"""

import argparse
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tools.stacks import real_stack
from tools.upstream import patch_lint, patch_tree
from tools.upstream.patch_series import PATCHES, Patch, Target, target_of, targets
from tools.upstream.patch_tree import git_apply, pristine

README = PATCHES / "README.md"
_TABLE = "<!-- python -m tools.upstream.upstream_patches status --write -->\n"


def verify_headers(target: Target, patches: Sequence[Patch]) -> Iterator[str]:
    """Yield faults of the patch files themselves."""
    for patch in patches:
        for fault in patch.faults(target):
            yield f"{patch.name}: {fault}"
    for name in target.stray_files():
        yield f"{name}: not in the series"


def verify_applies(
    target: Target, version: str, patches: Sequence[Patch]
) -> Iterator[str]:
    """Yield patches that do not apply, alone or together, or are not valid code."""
    base = pristine(target, version)
    for patch in patches:
        files = [target.file(p, version) for p in target.needed(patch)]
        if _is_in(base, files[-1]):
            yield f"{patch.name}: v{version} has it; see `drop`"
        elif complaint := git_apply(base, files, "--check"):
            yield f"{patch.name}: does not apply to v{version} alone: {complaint}"
    every = [target.file(patch, version) for patch in target.patches]
    if complaint := git_apply(base, every, "--check"):
        yield f"the series does not apply to v{version}: {complaint}"
        return
    tree = patch_tree.scratch(target, version, target.patches)
    yield from verify_code(tree, sorted({f for p in patches for f in p.files}))


def _is_in(tree: Path, file: Path) -> bool:
    """Whether a tree already contains a patch."""
    return git_apply(tree, [file], "--check", "--reverse") is None


def verify_code(tree: Path, files: Sequence[str]) -> Iterator[str]:
    """Yield files that do not compile."""
    for file in files:
        if not file.endswith(".py"):
            continue
        try:
            compile((tree / file).read_text(), file, "exec")
        except SyntaxError as error:
            yield f"{file}: {error}"


def verify_tests(
    target: Target, version: str, patches: Sequence[Patch]
) -> Iterator[str]:
    """Yield tests that do not fail without their patch, or do not pass with it."""
    for patch in patches:
        file = target.file(patch, version)
        wanted = [value.split(" -> ", 1) for value in patch.values("Fails-Without")]
        nodes = [node for node, _ in wanted]
        tree = patch_tree.scratch(target, version, target.needed(patch)[:-1])
        _apply_part(tree, file, "--include=tests/*")
        before = patch_tree.run_tests(target, tree, nodes)
        for node, reason in wanted:
            texts = [t for kind, t in _of(before, node) if kind == "failed"]
            if not texts:
                yield f"{patch.name}: {node} does not fail on v{version} without it"
            elif not all(re.search(reason, text) for text in texts):
                yield f"{patch.name}: {node} fails without it, but not by {reason!r}"
        _apply_part(tree, file, "--exclude=tests/*")
        after = patch_tree.run_tests(target, tree, nodes)
        for node in nodes:
            kinds = {kind for kind, _ in _of(after, node)}
            if kinds != {"passed"}:
                yield f"{patch.name}: {node} with it on v{version}: {kinds or 'no'}"
        print(
            f"v{version} {patch.name}: {len(after)} tests pass with it only", flush=True
        )


def _apply_part(tree: Path, file: Path, option: str) -> None:
    if complaint := git_apply(tree, [file], option):
        raise SystemExit(f"upstream_patches: {file.name}, {option}: {complaint}")


def _of(outcomes: patch_tree.Outcomes, node: str) -> list[tuple[str, str]]:
    """The outcomes of a file, class or function; or of collecting its file."""
    name = patch_tree.junit_name(node)
    found = [v for k, v in outcomes.items() if re.match(re.escape(name) + r"\b", k)]
    file = patch_tree.junit_name(node.partition("::")[0])
    return found or [v for k, v in outcomes.items() if k == file]


def verify_neighbours(target: Target, version: str) -> Iterator[str]:
    """Yield neighbouring tests of upstream whose results the series changes.

    And tests of the patches that do not pass with the whole series.
    """
    before = patch_tree.run_tests(target, pristine(target, version), target.neighbours)
    for file in target.neighbours:
        if not any(kind == "passed" for kind, _ in _of(before, file)):
            yield f"{file} on v{version}: nothing passes without the series"
    tree = patch_tree.scratch(target, version, target.patches, "series")
    values = [v for patch in target.patches for v in patch.values("Fails-Without")]
    nodes = [value.partition(" -> ")[0] for value in values]
    after = patch_tree.run_tests(target, tree, [*target.neighbours, *nodes])
    for node in nodes:
        kinds = {kind for kind, _ in _of(after, node)}
        if kinds != {"passed"}:
            yield f"{node} with the series on v{version}: {kinds or 'no'}"
    for name, (kind, _) in before.items():
        now = after.get(name, ("not run", ""))[0]
        if now != kind:
            yield f"{name} on v{version}: {kind} without the series, {now} with it"
    counts = [sum(k == kind for k, _ in before.values()) for kind in _KINDS]
    found = ", ".join(f"{count} {kind}" for count, kind in zip(counts, _KINDS))
    print(f"v{version} neighbours: {found}, with the series too", flush=True)


_KINDS = ("passed", "failed", "skipped")


def verify(arguments: argparse.Namespace) -> int:
    """Run all checks and print the faults."""
    wrong = False
    for target in targets():
        patches = _chosen(target, arguments.patches)
        if not patches:
            continue
        faults = list(verify_headers(target, patches))
        for version in target.versions:
            faults += verify_applies(target, version, patches)
        versions = list(target.versions)
        if arguments.changed:
            verified = target.verified
            versions = [v for v in versions if verified.get(v) != target.digest(v)]
        if versions and not faults:
            faults += patch_lint.lint(target, target.base, patches)
            faults += verify_by_tests(target, versions, patches)
            if not faults and patches == target.patches:
                target.write_verified()
        for fault in faults:
            print(f"upstream_patches: {fault}")
        wrong = wrong or bool(faults)
    return wrong


def lint(arguments: argparse.Namespace) -> int:
    """Run upstream's linters on the patches for the base releases."""
    wrong = False
    for target in targets():
        patches = _chosen(target, arguments.patches)
        for fault in patch_lint.lint(target, target.base, patches) if patches else ():
            print(f"upstream_patches: {fault}")
            wrong = True
    return wrong


def verify_by_tests(
    target: Target, versions: Sequence[str], patches: Sequence[Patch]
) -> list[str]:
    """Yield faults that upstream's tests find; runs several tests in parallel."""
    # Install them once, before parallel tests need them.
    patch_tree.requirements(target)
    if target.stack:
        real_stack.environment(target.stack)

    def check(version: str, neighbours: bool) -> list[str]:
        if neighbours:
            return list(verify_neighbours(target, version))
        return list(verify_tests(target, version, patches))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        checks = itertools.product(versions, (False, True))
        found = pool.map(lambda version_and_kind: check(*version_and_kind), checks)
        return [fault for faults in found for fault in faults]


def _chosen(target: Target, names: Sequence[str]) -> list[Patch]:
    return [patch for patch in target.patches if not names or patch.name in names]


def apply(arguments: argparse.Namespace) -> int:
    """Make a patched copy of the source tree."""
    target = target_of(arguments.project)
    patches = _chosen(target, arguments.patches)
    wanted = {q.name for p in patches for q in target.needed(p)}
    patches = [patch for patch in target.patches if patch.name in wanted]
    version = arguments.version or target.base
    patch_tree.apply(target, version, patches, arguments.out)
    return 0


def test(arguments: argparse.Namespace) -> int:
    """Run this project's tests on a copy of the installed vLLM, patched."""
    target = target_of("vllm")
    tree = patch_tree.patched_vllm(target, "patched")
    variables = {"PYTHONPATH": str(tree), "VLLM_ASCEND_CT_TEST_HOOKS": "1"}
    command = [sys.executable, "-m", "pytest", *arguments.rest]
    return subprocess.run(command, env={**os.environ, **variables}).returncode


_IDENTITY = {
    f"GIT_{role}_{field}": value
    for role in ("AUTHOR", "COMMITTER")
    for field, value in (("NAME", "vllm-ascend-ct"), ("EMAIL", "noreply@localhost"))
}


def _git(directory: Path, *arguments: str, stdin: bytes | None = None) -> str:
    result = subprocess.run(
        ["git", *arguments],
        cwd=directory,
        env={**os.environ, **_IDENTITY},
        input=stdin,
        stdout=subprocess.PIPE,
        check=True,
    )
    return result.stdout.decode()


def edit(arguments: argparse.Namespace) -> int:
    """Make a git repository with a commit for each patch."""
    target = target_of(arguments.project)
    version = arguments.version or target.base
    out = arguments.out
    patch_tree.apply(target, version, [], out)
    _git(out, "init", "--quiet")
    # Or an editor's commit would lose headings, and lines that begin with "#123".
    _git(out, "config", "core.commentChar", ";")
    for field in ("name", "email"):
        _git(out, "config", f"user.{field}", _IDENTITY[f"GIT_AUTHOR_{field.upper()}"])
    ignored = ["*.so", "__pycache__", *target.generated]
    (out / ".git/info/exclude").write_text("\n".join(ignored) + "\n")
    _git(out, "add", "--all")
    _git(out, "commit", "--quiet", "--message", f"v{version}")
    _git(out, "tag", "base")
    for patch in target.patches:
        file = target.file(patch, version)
        if not file.exists():
            continue
        _git(
            out, "am", "--quiet", "--3way", "--keep-non-patch", stdin=file.read_bytes()
        )
    print(f"{out}: change commits since the tag `base`, then `refresh {out}`")
    return 0


def refresh(arguments: argparse.Namespace) -> int:
    """Write the commits of a repository from `edit` back to the patches.

    For a version other than the base, write only backports of patches that do not apply
    to it.
    """
    target = target_of(arguments.project)
    version = arguments.version or target.base
    known = {p.subject: p for p in target.patches if p.path.exists()}
    new = (patch for patch in target.patches if not patch.path.exists())
    for commit in _git(arguments.out, "rev-list", "--reverse", "base..").split():
        subject = _git(arguments.out, "show", "-s", "--format=%s", commit).strip()
        text = _git(
            arguments.out,
            *("format-patch", "-1", "--stdout", "--zero-commit", "-N"),
            *("--no-signature", "-U2", commit),
        )
        patch = known.get(subject) or next(new, None)
        if patch is None:
            raise SystemExit(f"upstream_patches: add {subject!r} to the series first")
        path = patch.path
        if version != target.base:
            path = target.directory / "backports" / version / patch.name
            files = [target.file(p, version) for p in target.needed(patch)[:-1]]
            files.append(patch.path)
            if git_apply(pristine(target, version), files, "--check") is None:
                path.unlink(missing_ok=True)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return 0


def table(target: Target) -> str:
    """The table of a project's patches."""
    lines = [
        "| patch | what | status | source | makes removable | verified on |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for patch in target.patches:
        added, removed = patch.source_lines
        status, *_ = patch.values("Upstream-Status")
        date, *versions = patch.values("Last-Verified")[0].split()
        link = f"[{patch.path.stem}]({target.directory.name}/{patch.name})"
        count = f"{patch.removable_lines} lines"
        lines.append(
            f"| {link} | {patch.subject} | {status} | +{added} -{removed} "
            f"| {count} | {date}: {', '.join(versions)} |"
        )
    return "\n".join(lines) + "\n"


def tables() -> str:
    """The tables of all projects, with sums."""
    parts = []
    for target in targets():
        added = sum(patch.source_lines[0] for patch in target.patches)
        removed = sum(patch.source_lines[1] for patch in target.patches)
        statuses = [p.values("Upstream-Status")[0] for p in target.patches]
        pending = sum(status.startswith("Pending") for status in statuses)
        parts.append(
            f"## {target.project} {target.base}\n\n{table(target)}\n"
            f"{len(target.patches)} patches, {pending} pending; +{added} -{removed} "
            "lines of source.\n"
        )
    return "\n".join(parts)


def with_tables(readme: str) -> str:
    """The README's text with the current tables."""
    return readme.partition(_TABLE)[0] + _TABLE + "\n" + tables()


def status(arguments: argparse.Namespace) -> int:
    """Print the tables; write them to the README."""
    print(tables())
    if arguments.write:
        README.write_text(with_tables(README.read_text()))
    return 0


def drop(arguments: argparse.Namespace) -> int:
    """Print the patches that a release already contains."""
    found = False
    for target in targets():
        for version in target.versions:
            base = pristine(target, version)
            for patch in target.patches:
                if _is_in(base, target.file(patch, version)):
                    found = True
                    places = ", ".join(patch.values("Needed-By"))
                    print(f"drop {patch.name}: v{version} has it. Needed by: {places}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    for command in (verify, lint, test, apply, edit, refresh, status, drop):
        sub = commands.add_parser(command.__name__, help=command.__doc__)
        sub.set_defaults(command=command)
        if command in (apply, edit, refresh):
            sub.add_argument("out", type=Path)
            sub.add_argument("--project", default="vllm")
            sub.add_argument("--version")
        if command in (verify, lint, apply):
            sub.add_argument("patches", nargs="*", metavar="PATCH")
        if command is verify:
            sub.add_argument("--changed", action="store_true")
        if command is status:
            sub.add_argument("--write", action="store_true")
    arguments, rest = parser.parse_known_args()
    if rest and arguments.command is not test:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.rest = rest
    known = {patch.name for target in targets() for patch in target.patches}
    if unknown := set(getattr(arguments, "patches", ())) - known:
        parser.error(f"not in a series: {', '.join(sorted(unknown))}")
    return int(arguments.command(arguments))


if __name__ == "__main__":
    sys.exit(main())
