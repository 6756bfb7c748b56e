#!/usr/bin/env bash
# Train the phases in two jobs of different size: the encoder warm-up has no gradients for the decoder and needs less
# memory.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=../lib.sh
source "$here/../lib.sh"

usage() {
  cat <<'USAGE'
Usage: bash launchers/slurm/two_phase.sh [--both OPTIONS] [--first OPTIONS] [--second OPTIONS] --train RECIPE [ARGUMENTS]

Submits two jobs. The first job trains the first phase of RECIPE. The second job starts when the first is done, and
trains the other phases.

  --both OPTIONS      sbatch options of both jobs
  --first OPTIONS     sbatch options of the first job
  --second OPTIONS    sbatch options of the second job
  --train RECIPE [ARGUMENTS]
                      the recipe, and arguments of `vae-ds train` for both jobs, such as --run-dir (default: runs/NAME)

Example:
  bash launchers/slurm/two_phase.sh --both --partition=gpu --first --gpus-per-node=1 \
      --second --nodes=2 --gpus-per-node=4 --train ptb --run-dir runs/ptb --set data.path=data/ptb
USAGE
}

first=()
second=()
train=()
part=
for word in "$@"; do
  if [[ $part != train ]]; then
    case $word in
      -h | --help)
        usage
        exit 0
        ;;
      --both | --first | --second | --train)
        part=${word#--}
        continue
        ;;
    esac
  fi
  case $part in
    both) first+=("$word") second+=("$word") ;;
    first) first+=("$word") ;;
    second) second+=("$word") ;;
    train) train+=("$word") ;;
    *) die "unknown argument $word; see --help" "$WRONG_INPUT" ;;
  esac
done
((${#train[@]})) || die "--train RECIPE is missing; see --help" "$WRONG_INPUT"

one=$(sbatch --parsable --job-name=vae_ds-1 "${first[@]}" "$here/train.sbatch" "${train[@]}" --until 1)
one=${one%%;*}
# If the first job fails, SLURM cancels the second, which would otherwise wait forever.
two=$(sbatch --parsable --job-name=vae_ds-2 --dependency="afterok:$one" --kill-on-invalid-dep=yes "${second[@]}" \
  "$here/train.sbatch" "${train[@]}")
printf 'phase 1: job %s\nother phases: job %s, after phase 1\n' "$one" "${two%%;*}"
