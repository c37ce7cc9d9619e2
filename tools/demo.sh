#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
#
# Serve a small checkpoint with emulated NPU operators and ask it a question.
# Arguments go to tools/checkpoints/demo.py.
set -euo pipefail
cd "$(dirname "$0")/.."
tools/setup.sh
# What is imported is compiled once, not in each process.
unset PYTHONDONTWRITEBYTECODE
exec .venv/bin/python -m tools.checkpoints.demo "$@"
