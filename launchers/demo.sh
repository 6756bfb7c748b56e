#!/usr/bin/env bash
# Train a text VAE from a pretrained T5, evaluate it and show results: bash launchers/demo.sh
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$here/lib.sh"

usage() {
  cat <<'USAGE'
Usage: bash launchers/demo.sh [--runs DIR] [--set[-vae|-yardstick] KEY=VALUE ...] [--no-setup]

Sets up .venv (unless an environment is active), trains a text VAE in two phases and a plain language model for
comparison, evaluates both on the test split, and prints a table, reconstructions, samples and an interpolation. Uses
all GPUs; without GPUs, 2 processes. The same command resumes after a stop and skips finished stages.

  --runs DIR        the directory of the runs (default: $RUNS, otherwise runs/ in the repository)
  --set KEY=VALUE   change a recipe setting of both trainings; can be repeated
  --set-vae KEY=VALUE, --set-yardstick KEY=VALUE
                    change a recipe setting of one training; can be repeated
  --no-setup        install nothing; use the environment as it is
USAGE
}

runs=${RUNS:-$REPO/runs}
for_vae=()
for_yardstick=()
install=1
while (($#)); do
  case $1 in
    --no-setup) install=0 ;;
    -h | --help)
      usage
      exit 0
      ;;
    --runs | --set | --set-vae | --set-yardstick)
      (($# > 1)) || die "$1 needs a value; see --help" "$WRONG_INPUT"
      [[ $1 != --runs ]] || runs=$2
      [[ $1 != --set && $1 != --set-vae ]] || for_vae+=(--set "$2")
      [[ $1 != --set && $1 != --set-yardstick ]] || for_yardstick+=(--set "$2")
      shift
      ;;
    *) die "unknown argument $1; see --help" "$WRONG_INPUT" ;;
  esac
  shift
done

report=()
stage_name=
stage_began=0
SECONDS=0
# stage NAME: print the name of a stage, and record the duration of the stage before it.
stage() {
  [[ -z $stage_name ]] || report+=("$(printf '%5d s  %s' $((SECONDS - stage_began)) "$stage_name")")
  stage_name=$1
  stage_began=$SECONDS
  [[ -z $1 ]] || say "$1"
}

vae_ds() { attend "$PY" -m vae_ds "$@"; }
on_all_devices() { attend "$PY" "$REPO/launchers/ranks.py" -n "$count" "$@"; }

# check CODE WHAT: if a stage failed or was stopped, exit with its exit code.
check() {
  local code=$1 what=$2
  ((code)) || return 0
  ((code != STOPPED)) || printf '\nstopped. The same command resumes: bash launchers/demo.sh\n' >&2
  ((code == STOPPED)) || printf '\nerror: %s failed with exit code %d; see above\n' "$what" "$code" >&2
  exit "$code"
}

# train RECIPE RUN SETTINGS...: train a run that is not done. The outcome is read from status.json, because the launcher
# can exit with 0 after a failure.
train() {
  local recipe=$1 run=$2 code=0
  shift 2
  if "$PY" -m vae_ds status "$run" >/dev/null 2>&1; then
    echo "$run is done. To train it again, remove it, or choose another directory with --runs."
    return
  fi
  on_all_devices train "$recipe" --run-dir "$run" "$@" || code=$?
  if "$PY" -m vae_ds status "$run" 2>/dev/null && ((code != STOPPED)); then
    return
  fi
  ((code)) || code=1
  check "$code" "the training of $run"
}

# evaluate RUN ARGUMENTS...: evaluate a run, unless it was already evaluated after its training.
evaluate() {
  local run=$1 code=0
  shift
  if [[ $run/eval-test.json -nt $run/status.json ]]; then
    echo "$run/eval-test.json already exists."
    return
  fi
  # Drop the table of this run: one table at the end shows all runs.
  on_all_devices evaluate "$run" --split test "$@" >/dev/null || code=$?
  [[ $code -ne 0 || $run/eval-test.json -nt $run/status.json ]] || code=1
  check "$code" "the evaluation of $run"
}

# show ARGUMENTS...: run a short command on one process.
show() {
  local code=0
  vae_ds "$@" || code=$?
  check "$code" "vae-ds $1"
}

# A function, so that bash reads it completely before it runs: the script may change during the run.
demo() {
  stage "setup"
  if ((install)); then setup ""; else choose_environment; fi
  mkdir -p "$runs" || die "cannot create the directory $runs" "$WRONG_INPUT"
  runs=$(cd "$runs" && pwd)
  # Print short paths when called from the repository.
  [[ $PWD != "$REPO" ]] || runs=${runs#"$REPO"/}
  count=$(processes)
  # The demo's global batch of 64 divides only over powers of two.
  while ((count & (count - 1))); do count=$((count - 1)); done
  echo "$("$PY" --version), $count processes, runs in $runs"

  stage "train the VAE in two phases: $runs/demo"
  train demo "$runs/demo" "${for_vae[@]}"
  stage "train the yardstick, a plain language model from the same base: $runs/demo-yardstick"
  train demo-yardstick "$runs/demo-yardstick" "${for_yardstick[@]}"
  stage "evaluate the yardstick on the test split"
  evaluate "$runs/demo-yardstick"
  stage "evaluate the VAE on the test split"
  evaluate "$runs/demo" --yardstick "$runs/demo-yardstick"

  stage "results on the test split, in nats per sentence"
  show compare "$runs/demo" "$runs/demo-yardstick"
  stage "reconstructions of test sentences"
  show reconstruct "$runs/demo" --from test -n 5
  stage "samples from the prior"
  show sample "$runs/demo" -n 8
  stage "interpolation between two sentences, in equal steps through the latent space"
  show interpolate "$runs/demo" "The name of the file to read." "Returns true if the two objects are equal."
  stage ""

  say "done; seconds by stage"
  printf '%s\n' "${report[@]}"
  printf '%5d s  in all\n' "$SECONDS"
  tensorboard=$VENV/bin/tensorboard
  [[ $PWD != "$REPO" ]] || tensorboard=${tensorboard#"$REPO"/}
  printf '\nTo see the curves:\n  %q --logdir %q\n' "$tensorboard" "$runs"
}

demo
exit
