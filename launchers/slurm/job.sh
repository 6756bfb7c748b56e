# What the SLURM scripts share: one srun task a rank, logs of job and ranks, and the end of the job. Source it in a job.
# shellcheck shell=bash

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=../lib.sh
source "$here/../lib.sh"

LOST=69
[[ -n ${SLURM_JOB_ID:-} ]] || die "not inside a SLURM job; submit this script with sbatch, or run it in salloc's shell" "$WRONG_INPUT"

# The number of an array's last task is the whole array's.
JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}}
JOB=${JOB:-$SLURM_JOB_ID}

field() { scontrol show job --oneliner "$JOB" | sed -n "s/.* $1=\([^ ]*\).*/\1/p"; }
is_batch() { [[ $(field BatchFlag) == 1 ]]; }

# prepare_job: the environment, once for all jobs that start together on a shared file system.
prepare_job() {
  exec {lock}<"$REPO"
  flock "$lock"
  setup ""
  exec {lock}<&-
  # A build that a killed job leaves locked must not hang another.
  export TORCH_EXTENSIONS_DIR=${TMPDIR:-/tmp}/vae_ds-${USER:-$UID}-$SLURM_JOB_ID/torch_extensions
  export PYTHONUNBUFFERED=1
}

# log_folder: where the ranks' logs go, beside the job's own: NAME-7.log has NAME-7/rank-0.log, ...
log_folder() {
  local log
  log=$(field StdOut)
  if [[ -z $log ]]; then log=${SLURM_SUBMIT_DIR:-$PWD}/vae_ds-$SLURM_JOB_ID; fi
  printf '%s\n' "${log%.*}"
}

# fill WORD: the job's numbers in an argument, written as in SLURM's file names: %j job, %A array, %a place in it.
fill() {
  local word=$1
  word=${word//%j/$SLURM_JOB_ID}
  word=${word//%A/${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}
  printf '%s\n' "${word//%a/${SLURM_ARRAY_TASK_ID:-0}}"
}

# task_options: what srun has to be told. Tasks a node are what the user said, else one a GPU.
task_options() {
  options=(--kill-on-bad-exit=1 --wait=60)
  if [[ -z ${SLURM_NTASKS:-} && ${SLURM_GPUS_ON_NODE:-1} -gt 1 ]]; then
    # The job has one core a task, for fewer tasks than it has GPUs.
    options+=("--ntasks-per-node=$SLURM_GPUS_ON_NODE" --overcommit)
  fi
  # Newer releases of srun do not take it over from sbatch.
  [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || options+=("--cpus-per-task=$SLURM_CPUS_PER_TASK")
  [[ -z ${VAE_DS_CONTAINER:-} ]] || options+=("--container-image=$VAE_DS_CONTAINER")
  [[ -z ${VAE_DS_CONTAINER_MOUNTS:-} ]] || options+=("--container-mounts=$VAE_DS_CONTAINER_MOUNTS")
}

# run_ranks COMMAND ARGUMENTS...: a vae-ds command on all tasks of the job. Returns rank 0's own exit code.
run_ranks() {
  local words=() word code=0 own logs
  for word in "$@"; do words+=("$(fill "$word")"); done
  task_options
  if is_batch; then
    logs=$(log_folder)
    mkdir -p "$logs" || die "cannot make the directory $logs for the logs of the ranks"
    options+=(--open-mode=append "--output=$logs/rank-%t.log")
    own=$logs/exit_code
    printf '%s: job %s on %s, start %d: vae-ds %s\n' "$(date '+%F %T')" "$SLURM_JOB_ID" "$SLURM_JOB_NODELIST" \
      "$((${SLURM_RESTART_COUNT:-0} + 1))" "${words[*]}"
    printf 'follow it: tail -F %q\n' "$logs/rank-0.log"
  else
    options+=(--label)
    own=$(mktemp)
  fi
  rm -f "$own"
  VAE_DS_EXIT_FILE=$own wait_for srun "${options[@]}" "${VAE_DS_PYTHON:-$PY}" -m vae_ds "${words[@]}" || code=$?
  # srun's code says nothing of a rank that saved: it is 0 after scancel, and another rank's after a fault.
  if [[ -s $own ]]; then
    code=$(<"$own")
  elif ((code == 0)); then
    code=1
  fi
  if ((code != 0 && code != STOPPED)) && [[ -n ${logs:-} ]]; then show_failure "$logs"; fi
  return "$code"
}

# wait_for SRUN...: this shell outlives the ranks, whatever it hears. SLURM tells them too, but not in every case, so
# each signal goes on as SIGUSR1, which srun gives to all tasks.
wait_for() {
  local code heard=1
  "$@" &
  trap 'heard=1; kill -USR1 $! 2>/dev/null || true' INT TERM HUP USR1
  while ((heard)); do
    heard=0
    code=0
    wait $! || code=$?
  done
  trap - INT TERM HUP USR1
  return "$code"
}

# show_failure FOLDER: the end of the ranks' logs, so that the job's log alone tells what happened.
show_failure() {
  local log
  for log in "$1"/rank-*.log; do
    [[ -s $log ]] || continue
    printf -- '-- the end of %s\n' "$log"
    tail -n 12 "$log"
  done
}

# end_job CODE: a batch job that saved and stopped, or lost a rank or a node, goes back to the queue and resumes there,
# unless SLURM is ending it anyway.
end_job() {
  local code=$1
  printf '%s: exit code %d\n' "$(date '+%F %T')" "$code"
  # A lost node may be lost for good, and then the job would come back for ever.
  if ((code == LOST && ${SLURM_RESTART_COUNT:-0} < ${VAE_DS_RETRIES:-3} || code == STOPPED)) &&
    is_batch && [[ $(field JobState) == RUNNING ]]; then
    if scontrol requeue "$JOB"; then
      echo "the job is in the queue again and resumes"
    else
      echo "the job cannot be requeued here; submit it again, and it resumes" >&2
    fi
  fi
  exit "$code"
}
