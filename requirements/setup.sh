#!/usr/bin/env bash
# Makes .venv with ttc and all that its tests, demo and training need. Nothing is installed outside it. Called by make.
# On a machine with an NVIDIA GPU: stock vLLM and whatever versions pip resolves. Otherwise: the pinned CPU set.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$(command -v python3.11 || command -v python3)}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "ttc needs Python 3.11 or newer; $python is $("$python" -V). Set PYTHON=/path/to/python3.11" >&2
  exit 1
}
[ -x .venv/bin/python ] || "$python" -m venv .venv
pip() { .venv/bin/python -m pip --quiet --disable-pip-version-check "$1" --no-compile "${@:2}"; } # modules compile when first imported
log=.venv/setup.log
: >"$log"
quietly() { "$@" >>"$log" 2>&1 || { tail -n 20 "$log" >&2; echo "set-up failed: $*; the whole log is in $log" >&2; exit 1; }; }

if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; then
  echo "set-up: an NVIDIA GPU is here; installing stock vLLM (several GB)"
  quietly pip install -e '.[vllm,train,ray,tasks,plots,dev]'
else
  echo "set-up: no GPU; installing the pinned CPU versions (requirements/cpu.txt), about two minutes"
  torch=$(grep '^torch==' requirements/cpu.txt)
  # torch's CPU build is in the configured indexes, or else in PyTorch's own.
  pip install --no-deps "$torch" >>"$log" 2>&1 ||
    quietly pip install --no-deps --index-url https://download.pytorch.org/whl/cpu "$torch"
  quietly pip install --no-deps -r requirements/cpu.txt
  quietly pip install --no-deps --no-build-isolation -e .
fi
touch .venv/.ready
echo "set-up: done; .venv/bin/ttc is ready"
