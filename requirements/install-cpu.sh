#!/usr/bin/env bash
# Install FlowPrefill and a CPU-only SGLang into a virtual environment: install-cpu.sh VENV STAMP
#
# STAMP is a file in VENV that exists only after a complete installation, and whose name carries the checkout's path. So
#   * without it, VENV was interrupted half-way or copied from another checkout, and is made anew;
#   * with it, the requirements have changed since, and VENV is brought up to date in place.
#
# Environment: PYTHON          interpreter for VENV (default: the first suitable one on PATH)
#              EXTRAS          extras to install (default: cpu,plot,ray,dev)
#              TORCH_CPU_INDEX where to find a CPU build of PyTorch when the configured package index has none
set -euo pipefail

venv=$1 stamp=$2
torch_cpu_index=${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}
extras=${EXTRAS:-cpu,plot,ray,dev}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

fail() { printf 'install-cpu.sh: %s\n' "$*" >&2; exit 1; }
say() { printf '== %s\n' "$*"; }

is_suitable() {
  "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
    if is_suitable "$candidate"; then printf '%s\n' "$candidate"; return; fi
  done
  [ -z "${PYTHON:-}" ] || fail "PYTHON=$PYTHON is no Python 3.11 or newer with the venv module (it says: $("$PYTHON" --version 2>&1 | head -n 1 || true))"
  fail "no Python 3.11 or newer with the venv module on PATH; install one (on Debian also its package pythonX.Y-venv)" \
    "or name one: make PYTHON=/path/to/python3.11"
}

for package in kernels prefill_worker router; do
  [ -d "flowprefill_sglang/$package" ] || fail "flowprefill_sglang/$package is not a folder: this checkout has lost" \
    "its symbolic links; run 'git config core.symlinks true && git checkout -- flowprefill_sglang'"
done

# One installation at a time. pip inherits the lock, so a make that was killed keeps it until its pip has ended as well.
exec {lock}>"$venv.lock"
if ! flock --nonblock "$lock"; then
  say "waiting for another installation into $venv"
  flock "$lock"
fi
if [ -f "$stamp" ] && [ -z "$(find pyproject.toml requirements -type f -newer "$stamp")" ]; then
  exit 0 # somebody else has just done it
fi

if [ ! -f "$stamp" ]; then
  [ ! -e "$venv" ] || [ -f "$venv/pyvenv.cfg" ] || fail "$venv exists and is no virtual environment; move it away"
  python=$(find_python)
  say "new virtual environment $venv with $("$python" --version); this takes a few minutes"
  # Out of the way in one step, and recognisable from the first moment, so that an interruption here is no trouble.
  rm -rf "$venv.discarded"
  [ ! -e "$venv" ] || mv "$venv" "$venv.discarded"
  rm -rf "$venv.discarded" "$venv.new"
  mkdir "$venv.new"
  touch "$venv.new/pyvenv.cfg"
  mv "$venv.new" "$venv"
  "$python" -m venv "$venv"
fi
rm -f "$venv"/.stamp-*

pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

# torch first: whatever asks for torch later is then satisfied, and nothing pulls the CUDA build.
say "PyTorch for CPUs"
if ! pip install --quiet --requirement requirements/torch-cpu.txt; then
  say "the configured package index has no CPU build of PyTorch; trying $torch_cpu_index"
  pip install --quiet --extra-index-url "$torch_cpu_index" --requirement requirements/torch-cpu.txt
fi
say "SGLang without its CUDA packages"
pip install --quiet --no-deps --requirement requirements/sglang-cpu.txt
say "FlowPrefill [$extras]"
# No conflict warnings: SGLang's metadata asks for the CUDA stack, which is left out on purpose.
pip install --quiet --no-warn-conflicts --constraint requirements/torch-cpu.txt --editable ".[$extras]"
touch "$stamp"
say "done: $venv"
