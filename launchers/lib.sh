# What the launchers share: the environment, its setup, and jobs that a signal stops cleanly. Source it from bash.
# shellcheck shell=bash

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PINS=$REPO/launchers/constraints.txt
# This checkout's package, installed or not, from any directory.
export PYTHONPATH="$REPO${PYTHONPATH:+:$PYTHONPATH}"
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}

# Exit codes: 0 done, 1 a fault, 2 wrong input, 69 a rank or its machine is gone, 75 stopped. After the last two the same
# command resumes.
WRONG_INPUT=2
STOPPED=75

say() { printf '\n== %s\n' "$*"; }
die() {
  printf 'error: %s\n' "$1" >&2
  exit "${2:-1}"
}

recent_python() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

# The first Python of at least 3.11: $PYTHON, else what is on the PATH.
find_python() {
  local name
  for name in ${PYTHON:+"$PYTHON"} python3 python3.11 python3.12 python3.13 python; do
    if recent_python "$name"; then
      printf '%s\n' "$name"
      return
    fi
  done
  die "Python 3.11 or newer is needed; found $(python3 --version 2>&1 || true). Install one, or name it: PYTHON=/path/to/python3.11 bash $0" "$WRONG_INPUT"
}

# Sets VENV and PY: the active environment (conda's `base` does not count), else .venv beside the package.
choose_environment() {
  OWN_VENV=0
  if [[ -n ${VIRTUAL_ENV:-} ]]; then
    VENV=$VIRTUAL_ENV
  elif [[ -n ${CONDA_PREFIX:-} && ${CONDA_DEFAULT_ENV:-} != base ]]; then
    VENV=$CONDA_PREFIX
  else
    VENV=$REPO/.venv
    OWN_VENV=1
  fi
  PY=$VENV/bin/python
  if ((OWN_VENV)) && ! { recent_python "$PY" && "$PY" -m pip --version >/dev/null 2>&1; }; then
    local python
    python=$(find_python)
    say "making the virtual environment ${VENV#"$REPO"/} with $("$python" --version)"
    "$python" -m venv "$VENV" ||
      die "$python cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv" "$WRONG_INPUT"
  fi
  [[ -x $PY ]] || die "the active environment $VENV has no Python; deactivate it, and .venv is used" "$WRONG_INPUT"
  recent_python "$PY" ||
    die "the active environment $VENV has $("$PY" --version 2>&1); Python 3.11 or newer is needed. Deactivate it, and .venv is used" "$WRONG_INPUT"
  # A lock that a killed build leaves in a shared folder hangs everyone, so each environment has its own.
  export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$VENV/torch_extensions}
}

pip_install() {
  local quiet=--quiet
  [[ ! -t 1 ]] || quiet=--progress-bar=on
  "$PY" -m pip install --disable-pip-version-check "$quiet" "$@" || die "the installation failed; see above"
}

# setup [EXTRAS]: installs this checkout, pinned, unless that was done and neither setup.py nor the pins changed since.
setup() {
  choose_environment
  local extras=${1:-} stamp=$VENV/.vae_ds-setup pins=$PINS state
  state=$({
    printf '%s\n' "$REPO"
    cat "$REPO/setup.py" "$REPO/pyproject.toml" "$PINS"
  } | "$PY" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
  # More extras than asked for do no harm.
  if [[ -f $stamp && "$(<"$stamp") " == "$state "*"${extras:+$extras }" ]]; then
    return
  fi
  say "installing vae_ds${extras:+[$extras]} into ${VENV#"$REPO"/}: about a minute where the packages are at hand"
  if ((OWN_VENV)); then
    pip_install --constraint "$PINS" setuptools packaging
  else
    # A user's own environment keeps what it has, its CUDA build of torch above all; the pins hold for the rest.
    pip_install 'setuptools>=77' packaging
    pins=$VENV/.vae_ds-constraints.txt
    "$PY" "$REPO/launchers/missing_pins.py" "$REPO" >"$pins"
  fi
  # Building in the environment itself saves pip a second, isolated one.
  pip_install --constraint "$pins" --no-build-isolation --editable "$REPO${extras:+[$extras]}"
  printf '%s %s\n' "$state" "$extras" >"$stamp"
}

# install_programs PROGRAM=PACKAGE...: Debian packages whose program (or header) is missing, where root may install them.
install_programs() {
  local pair packages=()
  for pair in "$@"; do
    [[ -e ${pair%%=*} ]] || command -v "${pair%%=*}" >/dev/null || packages+=("${pair#*=}")
  done
  ((${#packages[@]} && UID == 0)) && command -v apt-get >/dev/null || return 0
  say "installing ${packages[*]}"
  {
    timeout 300 apt-get update --quiet=2
    DEBIAN_FRONTEND=noninteractive timeout 600 apt-get install --quiet=2 --yes --no-install-recommends "${packages[@]}"
  } </dev/null >/dev/null 2>&1 || echo "not all of them could be installed; the tests that need them are skipped"
}

# Bash runs a trap only between commands, so what can last runs beside the shell, and `attend COMMAND...` waits for it.
ATTENDED=
HEARD=0
INTERRUPTED=0
pass_on() {
  HEARD=1
  INTERRUPTED=1
  [[ -z $ATTENDED ]] || kill -TERM "$ATTENDED" 2>/dev/null || true
}
attend() {
  local code
  trap pass_on INT TERM HUP
  "$@" &
  ATTENDED=$!
  while :; do
    HEARD=0
    code=0
    wait "$ATTENDED" || code=$?
    ((HEARD)) || break
  done
  ATTENDED=
  trap - INT TERM HUP
  ((!INTERRUPTED)) || code=$STOPPED
  return "$code"
}

# The number of processes for a job on this machine: one a GPU, else two.
processes() { "$PY" -c 'import torch; print(torch.cuda.device_count() or 2)'; }
