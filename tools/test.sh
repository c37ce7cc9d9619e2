#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
#
# Lint, type-check, build the documentation and test; arguments go to pytest. With
# --long instead what takes minutes: two ranks, the real torch_npu and vllm-ascend,
# software NPUs, and the staged patches.
set -euo pipefail
cd "$(dirname "$0")/.."
tools/setup.sh
# What is imported is compiled once, not in each process.
unset PYTHONDONTWRITEBYTECODE
failed=0
# A stage that fails does not hide what others would say.
stage() {
  local start=$SECONDS
  "$@" || failed=1
  echo "test.sh: $((SECONDS - start)) s for $*"
}
if [ "${1:-}" = --long ]; then
  stage .venv/bin/python -m tools.soft_npu test
  stage .venv/bin/python -m tools.upstream.upstream_patches verify --changed
  # Where the patches change what is called.
  stage .venv/bin/python -m tools.upstream.upstream_patches test \
    tests/plugin/test_{hooks,register,other_quantization}.py tests/quantization \
    tests/kernels tests/layers/test_experts.py tests/engine/test_lora.py \
    -n logical --maxprocesses 4 --dist loadfile
  stage .venv/bin/python -m pytest -m long -n logical --maxprocesses 2 --dist loadfile
  stage .venv/bin/python -m tools.stacks.real_stack test \
    -n logical --maxprocesses 4 --dist loadfile
  exit $failed
fi
# Most tests quantize it. One core trains it while the other checks types.
.venv/bin/python -m tools.checkpoints.tiny_model &
trap "kill $! 2>/dev/null || true" EXIT
.venv/bin/ruff check .
.venv/bin/ruff format --check .
# The variable silences a notice about another tool.
NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict
.venv/bin/mypy
wait $!
.venv/bin/python -m pytest -n logical --maxprocesses 4 --dist loadfile "$@"
