#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
#
# Prepare a release: tools/release.sh 0.2.0. Sets the version, dates its part of the
# changelog, builds the wheel and the source distribution into dist, and says what is
# left to do. Commits nothing.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
  printf 'release: %s\n' "$@" >&2
  exit 1
}

version=${1:-}
[[ $version =~ ^[0-9]+\.[0-9]+\.[0-9]+(rc[0-9]+)?$ ]] ||
  fail "'$version' is no version. Supported: X.Y.Z and X.Y.ZrcN."
[ -z "$(git status --porcelain)" ] || fail "there are changes. Commit or stash them."
grep -q '^## Unreleased$' CHANGELOG.md ||
  fail "CHANGELOG.md has no part Unreleased. Write what has changed."

tools/setup.sh
sed -i "s/^__version__ = .*/__version__ = \"$version\"/" vllm_ascend_ct/__init__.py
sed -i "s/^## Unreleased$/&\n\n## $version - $(date -u +%Y-%m-%d)/" CHANGELOG.md
rm -rf dist
.venv/bin/python -m build --outdir dist .
ls dist
cat <<TEXT
release: next
  tools/test.sh && tools/test.sh --long
  .venv/bin/python -m tools.soft_npu test -m soft_npu
  .venv/bin/python -m tools.upstream.upstream_patches verify
  git commit -am "Release $version" && git tag v$version
TEXT
