# Functions of all launchers: the environment, its setup, and jobs that a signal stops cleanly. Source it from bash.
# shellcheck shell=bash

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PINS=$REPO/launchers/constraints.txt
# Use the package of this checkout, installed or not, from any directory.
export PYTHONPATH="$REPO${PYTHONPATH:+:$PYTHONPATH}"
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}

# Exit codes: 0 done, 1 a fault, 2 wrong input, 69 a rank or its machine is gone, 75 stopped. After 69 and 75 the same
# command resumes.
WRONG_INPUT=2
STOPPED=75

say() { printf '\n== %s\n' "$*"; }
die() {
  printf 'error: %s\n' "$1" >&2
  exit "${2:-1}"
}

recent_python() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

# Print the first Python of at least 3.11: $PYTHON, otherwise from the PATH.
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

# Set VENV and PY to the active environment (conda's `base` does not count), otherwise to .venv in the repository.
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
    say "creating the virtual environment ${VENV#"$REPO"/} with $("$python" --version)"
    "$python" -m venv "$VENV" ||
      die "$python cannot create a virtual environment; on Debian and Ubuntu: apt-get install python3-venv" "$WRONG_INPUT"
  fi
  [[ -x $PY ]] || die "the active environment $VENV has no Python; deactivate it to use .venv" "$WRONG_INPUT"
  recent_python "$PY" ||
    die "the active environment $VENV has $("$PY" --version 2>&1); Python 3.11 or newer is needed. Deactivate it to use .venv" "$WRONG_INPUT"
  # A killed build leaves a lock that blocks all users of the directory, so each environment has its own directory.
  export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$VENV/torch_extensions}
}

pip_install() {
  local quiet=--quiet
  [[ ! -t 1 ]] || quiet=--progress-bar=on
  "$PY" -m pip install --disable-pip-version-check "$quiet" "$@" || die "the installation failed; see above"
}

# setup [EXTRAS]: install this checkout with pinned versions, unless it was installed with the same setup.py and pins.
setup() {
  choose_environment
  local extras=${1:-} stamp=$VENV/.vae_ds-setup pins=$PINS state
  state=$({
    printf '%s\n' "$REPO"
    cat "$REPO/setup.py" "$REPO/pyproject.toml" "$PINS"
  } | "$PY" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
  # More installed extras than requested are fine.
  if [[ -f $stamp && "$(<"$stamp") " == "$state "*"${extras:+$extras }" ]]; then
    return
  fi
  say "installing vae_ds${extras:+[$extras]} into ${VENV#"$REPO"/}: about a minute if the packages are cached"
  if ((OWN_VENV)); then
    pip_install --constraint "$PINS" setuptools packaging
  else
    # A user's environment keeps its packages, in particular its CUDA build of torch. The pins apply to the rest.
    pip_install 'setuptools>=77' packaging
    pins=$VENV/.vae_ds-constraints.txt
    "$PY" "$REPO/launchers/missing_pins.py" "$REPO" >"$pins"
  fi
  # Build in the environment itself, so that pip does not create an isolated one.
  pip_install --constraint "$pins" --no-build-isolation --editable "$REPO${extras:+[$extras]}"
  printf '%s %s\n' "$state" "$extras" >"$stamp"
}

# install_programs PROGRAM=PACKAGE...: as root, install the Debian packages whose program (or header) is missing.
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
  } </dev/null >/dev/null 2>&1 || echo "not all packages could be installed; the tests that need them are skipped"
}

# attend COMMAND...: run the command in the background, wait for it, and pass signals on to it. Bash runs a trap only
# between two commands, so a command in the foreground would delay the trap.
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

# Print the number of processes for a job on this machine: one per GPU; without GPUs, two.
processes() { "$PY" -c 'import torch; print(torch.cuda.device_count() or 2)'; }
