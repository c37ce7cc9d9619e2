#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
#
# Lint, type-check and test, over the real torch_npu and vllm-ascend too. With arguments,
# which go to pytest, that is left out.
set -euo pipefail
cd "$(dirname "$0")/.."
tools/setup.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/python -m pytest -n logical --maxprocesses 4 --dist loadfile "$@"
[ $# -gt 0 ] || exec .venv/bin/python -m tools.real_stack test
