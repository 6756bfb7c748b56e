#!/usr/bin/env bash
# Run any vae-ds command on all devices of a machine without a network. launchers/wheelhouse.sh copies this file to the
# directory that it makes: bash DIR/offline.sh [--venv VENV] [-n N] train RECIPE [ARGUMENTS ...]
# Installs into VENV first (default: DIR/venv). Ctrl-C stops the ranks; the same command resumes.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[[ -f $here/launchers/lib.sh ]] || {
  echo "error: $here is no wheelhouse; make one on a machine with a network: bash launchers/wheelhouse.sh --to DIR" >&2
  exit 2
}
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$here/launchers/lib.sh"
# Packages of a cluster's modules would take precedence over those of the wheelhouse.
unset PYTHONPATH PYTHONHOME
manifest=$here/launchers/manifest.py

venv=$here/venv
if [[ ${1:-} == --venv ]]; then
  (($# > 1)) || die "--venv needs a directory" "$WRONG_INPUT"
  venv=$2
  shift 2
fi
(($#)) || die "name a vae-ds command, for example: bash $0 train RECIPE --run-dir runs/mine" "$WRONG_INPUT"

is_version() { "$1" -c 'import sys; sys.exit("%d.%d" % sys.version_info[:2] != sys.argv[1])' "$2" >/dev/null 2>&1; }

# python_of VERSION: print the Python that the wheels are for: $PYTHON, otherwise from the PATH.
python_of() {
  local name
  for name in ${PYTHON:+"$PYTHON"} "python$1" python3 python; do
    if is_version "$name" "$1"; then
      printf '%s\n' "$name"
      return
    fi
  done
  die "the wheels are for Python $1, which is not on the PATH; set its path: PYTHON=/path/to/python$1 bash $0" "$WRONG_INPUT"
}

# install_offline: install into the virtual environment, unless this wheelhouse is already installed there.
install_offline() {
  local stamp=$venv/.vae_ds-offline state python said
  [[ -f $here/manifest.json ]] || "$any" "$manifest" check "$here" || exit "$WRONG_INPUT"
  state=$(cksum <"$here/manifest.json")
  if [[ -f $stamp && $(<"$stamp") == "$state" ]]; then
    "$venv/bin/python" "$manifest" check "$here" --installed || exit "$WRONG_INPUT"
    return
  fi
  "$any" "$manifest" check "$here" || exit "$WRONG_INPUT"
  python=$(python_of "$("$any" "$manifest" python "$here")")
  [[ -f $stamp || -z $(ls -A "$venv") ]] ||
    die "$venv contains other files or a partial installation; remove it, or choose another directory with --venv" \
      "$WRONG_INPUT"
  say "installing into $venv with $("$python" --version)"
  "$python" -m venv --clear "$venv" ||
    die "cannot create the virtual environment $venv; choose another directory with --venv" "$WRONG_INPUT"
  : >"$stamp"
  # No index, and no settings of the user or the machine: packages must come only from the wheelhouse.
  PIP_CONFIG_FILE=/dev/null "$venv/bin/python" -m pip --isolated --disable-pip-version-check --quiet install \
    --no-compile --no-index --find-links "$here/wheels" vae_ds || die "the installation failed; see above"
  # Check that the installation works, and compile the used modules once for all ranks. Compiling all modules would take
  # three times as long.
  said=$("$venv/bin/python" -c 'import vae_ds.training' 2>&1) || {
    printf '%s\n' "$said" >&2
    die "the installed packages do not run on this machine; see above"
  }
  printf '%s\n' "$state" >"$stamp"
}

# cache_here: set VAE_DS_CACHE to the cache of the wheelhouse, or to a copy if it is not writable.
cache_here() {
  export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1
  [[ -d $here/cache ]] || return 0
  if [[ -w $here/cache ]]; then
    export VAE_DS_CACHE=$here/cache
    return
  fi
  export VAE_DS_CACHE=${VAE_DS_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/vae_ds}
  # The files are named by their contents, so they do not conflict with existing files.
  if ! { mkdir -p "$VAE_DS_CACHE" && cp -Ru "$here/cache/." "$VAE_DS_CACHE"; }; then
    die "$VAE_DS_CACHE: cannot copy the cache there; set VAE_DS_CACHE to a writable directory" "$WRONG_INPUT"
  fi
}

any=$(find_python)
mkdir -p "$venv" 2>/dev/null || die "cannot create the directory $venv; choose another directory with --venv" "$WRONG_INPUT"
venv=$(cd "$venv" && pwd)
{
  # Nodes that share a file system start at the same time. One of them installs for all.
  flock 9 2>/dev/null || true
  install_offline
  cache_here
} 9<"$venv"
PY=$venv/bin/python

export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$venv/torch_extensions}

# To train the recipe of the wheelhouse, use the copies of the recipe, the base and the text.
words=("$@")
recipe=$("$PY" "$manifest" recipe "$here")
if [[ -n $recipe ]]; then
  train=-1
  for place in "${!words[@]}"; do
    if [[ $train -lt 0 && ${words[place]} == train ]]; then
      train=$place
    elif [[ $train -ge 0 && ${words[place]} == "$recipe" ]]; then
      mapfile -t settings < <("$PY" "$manifest" settings "$here")
      words[place]=$here/recipe.yaml
      # Before the user's settings, so that these override.
      words=("${words[@]:0:train+1}" "${settings[@]/#/--set=}" "${words[@]:train+1}")
      break
    fi
  done
fi
exec "$PY" "$here/launchers/ranks.py" "${words[@]}"
