#!/usr/bin/env bash
# Run any vae-ds command on several nodes without SLURM, through the deepspeed launcher. See --help.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$here/lib.sh"

usage() {
  cat <<'USAGE'
Usage: bash launchers/multinode.sh [--no-setup] --hostfile HOSTS [OPTIONS] COMMAND ...
       bash launchers/multinode.sh [--no-setup] --hostfile HOSTS --no-ssh --node-rank K --master-addr A COMMAND ...
       bash launchers/multinode.sh [--no-setup] --nodes N --node-rank K --master-addr A COMMAND ...

COMMAND ... is any vae-ds command, such as `train RECIPE --run-dir DIR`. HOSTS is a file with one line `name slots=8`
per node.

The first form starts all nodes from this machine. It needs pdsh, ssh without a password, and this directory and the
environment at the same path on every node. The other forms start one node: run the same command on each node, by hand
or with an orchestrator. The run directory must be on a file system that all nodes share.

  --master-addr A      the address of the first node, or MASTER_ADDR (default over ssh: the node reports it)
  --master-port P      a free port of the first node, or MASTER_PORT (default over ssh: a free port; otherwise 29500)
  --interface NAME     the network interface between the nodes, for gloo and NCCL (default: they choose one)
  --node-rank K        the rank of this node, from 0, or NODE_RANK
  --nodes N            the number of nodes, without a hostfile, or NNODES
  --gpus-per-node M    the number of processes per node (default: one per GPU; without GPUs, 2)
  --no-setup           install nothing; use the environment as it is

Example:
  bash launchers/multinode.sh --hostfile hosts train ptb --run-dir runs/ptb

After Ctrl-C or SIGTERM, here or on any node, all ranks save and stop, and the same command resumes.
Exit codes: 0 done, 1 a fault, 2 wrong input, 69 a rank or its node is gone, 75 stopped. After 69 and 75 the same
command resumes.
USAGE
}

install=1
while (($#)); do
  case $1 in
    --no-setup) install=0 ;;
    -h | --help)
      usage
      exit 0
      ;;
    *) break ;;
  esac
  shift
done

if ((install)); then
  # Nodes that share a file system start at the same time. One of them installs for all.
  {
    flock 9 2>/dev/null || true
    setup ""
  } 9<"$PINS"
else
  choose_environment
fi
exec "$PY" "$REPO/launchers/ranks.py" --multinode "$@"
