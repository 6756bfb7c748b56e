#!/usr/bin/env bash
# Collect everything that a machine without a network needs: bash launchers/wheelhouse.sh --to DIR. See --help.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$here/lib.sh"

usage() {
  cat <<'USAGE'
Usage: bash launchers/wheelhouse.sh --to DIR [OPTIONS] [-- PIP OPTIONS]

Fills DIR with vae_ds and all its requirements. Run it on a machine with a network, and copy DIR to the machine without
one. There:

  bash DIR/offline.sh train RECIPE --run-dir RUN

  --to DIR             a new directory, or one that this script made
  --python 3.X         the Python version of the other machine (default: that of this environment)
  --platform NAME      the platform of the other machine (default: manylinux_2_28 with this machine's architecture)
  --recipe RECIPE      include what the recipe needs: its base model, its text, and the token ids of the text
  --set KEY=VALUE      change a setting of the recipe; can be repeated
  --no-setup           install nothing here; use the environment as it is
  -- PIP OPTIONS       options for the download, for example another build of torch: -- --extra-index-url URL

Example:
  bash launchers/wheelhouse.sh --to house --python 3.12 --recipe ptb --set data.path=data/ptb

Run it again to update DIR. Exit codes: 0 done, 1 a fault, 2 wrong input, such as a package without a wheel.
USAGE
}

to=
python=
platform=manylinux_2_28_$(uname -m)
recipe=
settings=()
install=1
pip_options=()
while (($#)); do
  case $1 in
    --no-setup) install=0 ;;
    -h | --help)
      usage
      exit 0
      ;;
    --)
      shift
      pip_options=("$@")
      break
      ;;
    --to | --python | --platform | --recipe | --set)
      (($# > 1)) || die "$1 needs a value; see --help" "$WRONG_INPUT"
      case $1 in
        --to) to=$2 ;;
        --python) python=$2 ;;
        --platform) platform=$2 ;;
        --recipe) recipe=$2 ;;
        --set) settings+=("$2") ;;
      esac
      shift
      ;;
    *) die "unknown argument $1; see --help" "$WRONG_INPUT" ;;
  esac
  shift
done
[[ -n $to ]] || die "--to DIR is missing; see --help" "$WRONG_INPUT"
[[ -n $recipe || ${#settings[@]} -eq 0 ]] || die "--set needs a recipe; name it with --recipe" "$WRONG_INPUT"
[[ -z $python || $python =~ ^3\.(1[1-9]|[2-9][0-9])$ ]] ||
  die "--python $python: expected 3.11 or newer, such as 3.12" "$WRONG_INPUT"
mkdir -p "$to" || die "cannot create the directory $to" "$WRONG_INPUT"
to=$(cd "$to" && pwd)
mark=$to/.vae_ds-wheelhouse
[[ -f $mark || -z $(ls -A "$to") ]] || die "$to contains other files; name a new directory" "$WRONG_INPUT"

# platforms: print the platform and the older ones that it includes. pip does not add these itself.
platforms() {
  local minor machine
  if [[ ! $platform =~ ^manylinux_2_([0-9]+)_(.+)$ ]]; then
    printf '%s\n' "$platform"
    return
  fi
  machine=${BASH_REMATCH[2]}
  for ((minor = BASH_REMATCH[1]; minor >= 5; minor--)); do printf 'manylinux_2_%d_%s\n' "$minor" "$machine"; done
  printf "%s_$machine\n" manylinux2014 manylinux2010 manylinux1 linux
}

# On the file system of the result: /tmp may be small, and a CUDA build of torch needs gigabytes.
rm -rf "$to"/.partial-*
scratch=$(mktemp -d "$to/.partial-XXXXXX")
touch "$mark"
trap 'rm -rf "$scratch"' EXIT
logged=(--log "$scratch/log" --quiet --progress-bar=off)
[[ ! -t 1 ]] || logged=(--log "$scratch/log" --progress-bar=on)
pip() { attend "$PY" -m pip --disable-pip-version-check --no-input "$@"; }

# explain CODE WHAT: exit after a failure of pip, with the reason from its log and its error output.
explain() {
  local missing
  (($1 != STOPPED)) || exit "$STOPPED"
  missing=$(sed -n 's/.* ERROR: No matching distribution found for \([^ ]*\).*/\1/p
    s/.* The user requested (constraint) //p' "$scratch/log" | head -n 1)
  if [[ -n $missing ]] && ! grep -q '^WARNING: Retrying' "$scratch/errors"; then
    die "pip finds no $missing for Python $python on $platform; name another index after --, see --help" \
      "$WRONG_INPUT"
  fi
  tail -n 20 "$scratch/errors" >&2
  die "$2 failed; see above"
}

# build WHAT...: build a wheel from source in this environment.
build() {
  pip wheel "${logged[@]}" --no-deps --no-build-isolation --wheel-dir "$scratch/built" "$@" 2>"$scratch/errors" ||
    explain $? "the build of $1"
}

build_wheels() {
  mkdir "$scratch/source"
  cp -R "$REPO/vae_ds" "$REPO/ds_configs" "$REPO/setup.py" "$REPO/pyproject.toml" "$REPO/LICENSE" "$scratch/source"
  [[ ! -f $REPO/README.md ]] || cp "$REPO/README.md" "$scratch/source"
  build "$scratch/source"
  # DeepSpeed is published only as source. This compiles nothing: its operators are built where they run.
  DS_BUILD_OPS=0 build "$(grep '^deepspeed==' "$PINS")" "${pip_options[@]}"
  local wheel
  for wheel in "$scratch"/built/*.whl; do
    [[ $wheel == *-none-any.whl ]] || die "${wheel##*/} runs only on this machine type; expected a pure Python wheel"
  done
}

download() {
  local name arguments=(--only-binary=:all: --implementation cp --python-version "$python")
  while read -r name; do arguments+=(--platform "$name"); done < <(platforms)
  pip download "${logged[@]}" "${arguments[@]}" --constraint "$PINS" --find-links "$scratch/built" \
    --dest "$scratch/wheels" "${pip_options[@]}" vae_ds 2>"$scratch/errors" || explain $? "the download"
}

take_recipe() {
  local line code=0
  attend "$PY" "$REPO/launchers/bundle.py" "$to" "$recipe" "${settings[@]}" >"$scratch/settings" || code=$?
  ((!code)) || exit "$code"
  while read -r line; do manifest+=(--setting "$line"); done <"$scratch/settings"
}

wheelhouse() {
  if ((install)); then setup ""; else choose_environment; fi
  [[ -n $python ]] || python=$("$PY" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  # Without the manifest the directory counts as incomplete.
  rm -f "$to/manifest.json"
  say "wheels for Python $python on $platform"
  build_wheels
  download
  rm -rf "$to/wheels" "$to/base" "$to/corpus" "$to/cache" "$to/recipe.yaml"
  mv "$scratch/wheels" "$to/wheels"
  local manifest=(--python "$python" --platform "$platform")
  if [[ -n $recipe ]]; then
    say "base, text and token ids of $recipe"
    take_recipe
    manifest+=(--recipe "$recipe")
  fi
  mkdir -p "$to/launchers"
  cp "$here/lib.sh" "$here/ranks.py" "$here/nodes.py" "$here/manifest.py" "$to/launchers"
  cp "$here/offline.sh" "$to/offline.sh"
  "$PY" "$here/manifest.py" write "$to" "${manifest[@]}"
  say "done: $(du -sh "$to" | cut -f1) in $to"
  printf 'Copy it to the machine without a network. There:\n  bash %q train %q --run-dir runs/mine\n' \
    "${to##*/}/offline.sh" "${recipe:-RECIPE}"
}

# A function, so that bash reads it completely before it runs: the script may change during the run.
wheelhouse
exit
