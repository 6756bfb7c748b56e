#!/usr/bin/env bash
# Everything a machine without a network needs, in one directory: bash launchers/wheelhouse.sh --to DIR. See --help.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$here/lib.sh"

usage() {
  cat <<'USAGE'
Usage: bash launchers/wheelhouse.sh --to DIR [OPTIONS] [-- PIP OPTIONS]

Fills DIR, where there is a network, with vae_ds and everything that it needs. Copy DIR to the machine that has none:

  bash DIR/offline.sh train RECIPE --run-dir RUN

  --python 3.X         the Python of that machine (default: this one's)
  --platform NAME      its kind (default: manylinux_2_28 of this machine's architecture)
  --recipe RECIPE      takes along what the recipe needs: its base model, its text, and the text's token ids
  --set KEY=VALUE      changes a setting of the recipe; may be given many times
  --no-setup           install nothing here, use the environment as it is
  -- PIP OPTIONS       where the wheels come from, for example another build of torch:
                       -- --extra-index-url URL

Run it again to renew DIR. Exit codes: 0 done, 1 a fault, 2 wrong input, such as a package without a wheel.
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
[[ -n $to ]] || die "where to? --to DIR; see --help" "$WRONG_INPUT"
[[ -n $recipe || ${#settings[@]} -eq 0 ]] || die "--set changes a recipe; name it with --recipe" "$WRONG_INPUT"
[[ -z $python || $python =~ ^3\.(1[1-9]|[2-9][0-9])$ ]] ||
  die "--python $python: expected a version from 3.11 on, such as 3.12" "$WRONG_INPUT"
mkdir -p "$to" || die "cannot make the directory $to" "$WRONG_INPUT"
to=$(cd "$to" && pwd)
mark=$to/.vae_ds-wheelhouse
[[ -f $mark || -z $(ls -A "$to") ]] || die "$to holds other things; name a new directory" "$WRONG_INPUT"

# platforms: that one and the older ones that it includes; pip takes a name alone literally.
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

# Beside what it becomes: /tmp may be small, and a CUDA build of torch brings gigabytes.
rm -rf "$to"/.partial-*
scratch=$(mktemp -d "$to/.partial-XXXXXX")
touch "$mark"
trap 'rm -rf "$scratch"' EXIT
logged=(--log "$scratch/log" --quiet --progress-bar=off)
[[ ! -t 1 ]] || logged=(--log "$scratch/log" --progress-bar=on)
pip() { attend "$PY" -m pip --disable-pip-version-check --no-input "$@"; }

# explain CODE WHAT: the end after pip failed; why stands in its log, and in what it said.
explain() {
  local missing
  (($1 != STOPPED)) || exit "$STOPPED"
  missing=$(sed -n 's/.* ERROR: No matching distribution found for \([^ ]*\).*/\1/p
    s/.* The user requested (constraint) //p' "$scratch/log" | head -n 1)
  if [[ -n $missing ]] && ! grep -q '^WARNING: Retrying' "$scratch/errors"; then
    die "no $missing for Python $python on $platform where pip looks; name another index after --, see --help" \
      "$WRONG_INPUT"
  fi
  tail -n 20 "$scratch/errors" >&2
  die "$2 failed; see above"
}

# build WHAT...: a wheel from source, made in this environment.
build() {
  pip wheel "${logged[@]}" --no-deps --no-build-isolation --wheel-dir "$scratch/built" "$@" 2>"$scratch/errors" ||
    explain $? "the build of $1"
}

build_wheels() {
  mkdir "$scratch/source"
  cp -R "$REPO/vae_ds" "$REPO/ds_configs" "$REPO/setup.py" "$REPO/pyproject.toml" "$REPO/LICENSE" "$scratch/source"
  [[ ! -f $REPO/README.md ]] || cp "$REPO/README.md" "$scratch/source"
  build "$scratch/source"
  # Only its source is published. It compiles nothing here: its operators are built where they run.
  DS_BUILD_OPS=0 build "$(grep '^deepspeed==' "$PINS")" "${pip_options[@]}"
  local wheel
  for wheel in "$scratch"/built/*.whl; do
    [[ $wheel == *-none-any.whl ]] || die "${wheel##*/} is for this machine alone; it should be pure Python"
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
  # Without its list the directory counts as unfinished.
  rm -f "$to/manifest.json"
  say "wheels for Python $python on $platform"
  build_wheels
  download
  rm -rf "$to/wheels" "$to/base" "$to/corpus" "$to/cache" "$to/recipe.yaml"
  mv "$scratch/wheels" "$to/wheels"
  local manifest=(--python "$python" --platform "$platform")
  if [[ -n $recipe ]]; then
    say "what $recipe needs"
    take_recipe
    manifest+=(--recipe "$recipe")
  fi
  mkdir -p "$to/launchers"
  cp "$here/lib.sh" "$here/ranks.py" "$here/nodes.py" "$here/manifest.py" "$to/launchers"
  cp "$here/offline.sh" "$to/offline.sh"
  "$PY" "$here/manifest.py" write "$to" "${manifest[@]}"
  say "done: $(du -sh "$to" | cut -f1) in $to"
  printf 'Copy it to the machine without a network; there:\n  bash %q train %q --run-dir runs/mine\n' \
    "${to##*/}/offline.sh" "${recipe:-RECIPE}"
}

# Read whole before it runs: bash reads a script line by line, and this one may change meanwhile.
wheelhouse
exit
