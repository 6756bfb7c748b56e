# Functions of all SLURM scripts: one srun task per rank, logs of job and ranks, end of the job. Source it in a job.
# shellcheck shell=bash

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=../lib.sh
source "$here/../lib.sh"

LOST=69
[[ -n ${SLURM_JOB_ID:-} ]] || die "not inside a SLURM job; submit this script with sbatch, or run it in salloc's shell" "$WRONG_INPUT"

# The last task of an array has the job number of the whole array, so name the task by array and index.
JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}}
JOB=${JOB:-$SLURM_JOB_ID}

field() { scontrol show job --oneliner "$JOB" | sed -n "s/.* $1=\([^ ]*\).*/\1/p"; }
is_batch() { [[ $(field BatchFlag) == 1 ]]; }

# prepare_job: set up the environment. With the lock, one job installs for all that start together on a shared disk. A
# container brings its own.
prepare_job() {
  if [[ -z ${VAE_DS_CONTAINER:-} ]]; then
    exec {lock}<"$REPO"
    flock "$lock"
    setup ""
    exec {lock}<&-
  fi
  # A name that nobody knows before: others could put a library of theirs into a known one, and it would be loaded. A
  # new one for each start, since the lock of a build in a killed job must not block other jobs.
  local private
  private=$(mktemp -d "${TMPDIR:-/tmp}/vae_ds-XXXXXXXXXXXX") || die "cannot write to the directory ${TMPDIR:-/tmp}"
  export TORCH_EXTENSIONS_DIR=$private/torch_extensions
  export PYTHONUNBUFFERED=1
}

# log_folder: print the directory of the ranks' logs: for the job log NAME-7.log it is NAME-7, with rank-0.log etc.
log_folder() {
  local log
  log=$(field StdOut)
  if [[ -z $log ]]; then log=${SLURM_SUBMIT_DIR:-$PWD}/vae_ds-$SLURM_JOB_ID; fi
  printf '%s\n' "${log%.*}"
}

# fill WORD: replace the placeholders of SLURM's file names in an argument: %j job, %A array, %a index in the array.
fill() {
  local word=$1
  word=${word//%j/$SLURM_JOB_ID}
  word=${word//%A/${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}
  printf '%s\n' "${word//%a/${SLURM_ARRAY_TASK_ID:-0}}"
}

# task_options: set the options of srun. The number of tasks is that of the user, otherwise one per GPU.
task_options() {
  options=(--kill-on-bad-exit=1 --wait=60)
  if [[ -z ${SLURM_NTASKS:-} && ${SLURM_GPUS_ON_NODE:-1} -gt 1 ]]; then
    # The job has one core per task, and fewer tasks than GPUs, so the cores must be shared.
    options+=("--ntasks-per-node=$SLURM_GPUS_ON_NODE" --overcommit)
  fi
  # Newer releases of srun do not inherit it from sbatch.
  [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || options+=("--cpus-per-task=$SLURM_CPUS_PER_TASK")
  [[ -n ${VAE_DS_CONTAINER:-} && $VAE_DS_CONTAINER != *.sif ]] || return 0
  options+=("--container-image=$VAE_DS_CONTAINER")
  [[ -z ${VAE_DS_CONTAINER_MOUNTS:-} ]] || options+=("--container-mounts=$VAE_DS_CONTAINER_MOUNTS")
}

# python_command: set the command of a rank's Python: that of the environment, or that of the container. Apptainer opens
# an image file (.sif) itself; any other image is for the plug-in pyxis of srun.
python_command() {
  python=("${VAE_DS_PYTHON:-${VAE_DS_CONTAINER:+python}}")
  [[ -n ${python[0]} ]] || python=("$PY")
  [[ ${VAE_DS_CONTAINER:-} == *.sif ]] || return 0
  local mounts=${VAE_DS_CONTAINER_MOUNTS:-}
  # --nv: the GPUs and their driver. Apptainer makes the home and the current directory visible without a mount.
  python=(apptainer exec --nv ${mounts:+--bind "$mounts"} "$VAE_DS_CONTAINER" "${python[@]}")
}

# run_ranks COMMAND ARGUMENTS...: run a vae-ds command on all tasks of the job. Returns the exit code of rank 0.
run_ranks() {
  local words=() word code=0 exit_file errors logs python
  for word in "$@"; do words+=("$(fill "$word")"); done
  task_options
  python_command
  if is_batch; then
    logs=$(log_folder)
    mkdir -p "$logs" || die "cannot create the directory $logs for the logs of the ranks"
    options+=(--open-mode=append "--output=$logs/rank-%t.log")
    exit_file=$logs/exit_code
    printf '%s: job %s on %s, start %d: vae-ds %s\n' "$(date '+%F %T')" "$SLURM_JOB_ID" "$SLURM_JOB_NODELIST" \
      "$((${SLURM_RESTART_COUNT:-0} + 1))" "${words[*]}"
    printf 'follow it: tail -F %q\n' "$logs/rank-0.log"
  else
    options+=(--label)
    exit_file=$(mktemp)
  fi
  rm -f "$exit_file"
  errors=$(mktemp)
  VAE_DS_EXIT_FILE=$exit_file wait_for srun "${options[@]}" "${python[@]}" -m vae_ds "${words[@]}" \
    2> >(tee "$errors" >&2) || code=$?
  # The exit code of srun can differ from that of rank 0: it is 0 after scancel, and another rank's code after a fault.
  if [[ -s $exit_file ]]; then
    code=$(<"$exit_file")
  elif ((code == 0)); then
    code=1
  fi
  if ((code != 0 && code != STOPPED && code != WRONG_INPUT)) && was_aborted "$errors"; then code=$LOST; fi
  rm -f "$errors"
  if ((code != 0 && code != STOPPED)) && [[ -n ${logs:-} ]]; then show_failure "$logs"; fi
  return "$code"
}

# was_aborted ERRORS: whether the first rank that ended was aborted, by what srun has written. NCCL aborts a rank
# (SIGABRT) if another one, or its machine, is gone or does not answer; such a rank leaves no exit code. The ranks that
# srun ends after it are killed by other signals.
was_aborted() {
  local first _
  for _ in {1..10}; do
    first=$(grep -m 1 -E '^srun: error: .*tasks? [-0-9,]+: ' "$1") && break
    # The copy may still be under way.
    sleep 0.1
  done
  [[ $first == *": Aborted"* ]]
}

# wait_for SRUN...: run srun and wait for it, whatever signals this shell receives. SLURM does not signal the ranks in
# every case, so each signal is passed on as SIGUSR1, which srun forwards to all tasks.
wait_for() {
  local code signalled=1
  "$@" &
  trap 'signalled=1; kill -USR1 $! 2>/dev/null || true' INT TERM HUP USR1
  while ((signalled)); do
    signalled=0
    code=0
    wait $! || code=$?
  done
  trap - INT TERM HUP USR1
  return "$code"
}

# show_failure FOLDER: print the end of the ranks' logs, so that the log of the job shows the cause.
show_failure() {
  local log
  for log in "$1"/rank-*.log; do
    [[ -s $log ]] || continue
    printf -- '-- the end of %s\n' "$log"
    tail -n 12 "$log"
  done
}

# end_job CODE: exit with CODE. A batch job that saved and stopped, or lost a rank or a node, is requeued and resumes,
# unless SLURM is ending the job.
end_job() {
  local code=$1
  printf '%s: exit code %d\n' "$(date '+%F %T')" "$code"
  # A lost node may not come back. The limit prevents endless requeueing.
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
