#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
#
# Make checkpoints with llm-compressor, in build/llm-compressor-venv. Arguments go to
# tools/checkpoints/llm_compressor.py. PYTHON names the interpreter to use.
set -euo pipefail
cd "$(dirname "$0")/../.."
venv=build/llm-compressor-venv
if [ ! -e "$venv/complete" ]; then
  rm -rf "$venv"
  "${PYTHON:-python3.11}" -m venv "$venv"
  "$venv/bin/python" -m pip install -qq llmcompressor==0.14.0.1 torch==2.13.0+cpu
  touch "$venv/complete"
fi
exec "$venv/bin/python" -m tools.checkpoints.llm_compressor "$@"
