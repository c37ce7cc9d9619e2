#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
#
# Lint, type-check and test; arguments go to pytest. With --long instead what takes
# minutes, and what runs over the real torch_npu and vllm-ascend.
set -euo pipefail
cd "$(dirname "$0")/.."
tools/setup.sh
if [ "${1:-}" = --long ]; then
  .venv/bin/python -m pytest -m long
  exec .venv/bin/python -m tools.real_stack test
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/python -m pytest -n logical --maxprocesses 4 --dist loadfile "$@"
