#!/usr/bin/env bash
# Any vae-ds command on several nodes without SLURM, through the deepspeed launcher. See --help.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$here/lib.sh"

usage() {
  cat <<'USAGE'
Usage: bash launchers/multinode.sh [--no-setup] --hostfile HOSTS [OPTIONS] COMMAND ...
       bash launchers/multinode.sh [--no-setup] --hostfile HOSTS --no-ssh --node-rank K --master-addr A COMMAND ...
       bash launchers/multinode.sh [--no-setup] --nodes N --node-rank K --master-addr A COMMAND ...

COMMAND ... is any vae-ds command, such as `train RECIPE --run-dir DIR`. HOSTS has a line `name slots=8` a node.

The first way starts all nodes from here: pdsh and ssh without a password lead to them, and this directory and the
environment are at the same path there. The others start one node, and the same command runs on each of the N, by hand
or by an orchestrator. The run directory is on a file system that all nodes share.

  --master-addr A      the first node's address (default: by ssh, what the first node calls its own); or MASTER_ADDR
  --master-port P      a free port there (default: by ssh, one that it finds free; else 29500); or MASTER_PORT
  --interface NAME     the network interface that joins the nodes, for gloo and NCCL (default: they choose)
  --node-rank K        which node this is, from 0; or NODE_RANK
  --nodes N            how many there are, where there is no hostfile; or NNODES
  --gpus-per-node M    processes on each of them (default: one a GPU; without GPUs, 2)
  --no-setup           install nothing, use the environment as it is

Ctrl-C or SIGTERM, here or on any node: all ranks save and stop, and the same command resumes.
Exit codes: 0 done, 1 a fault, 2 wrong input, 69 a rank or its node is gone, 75 stopped; 69 and 75 resume.
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
  # Nodes that share a file system start at once, and one installs for all.
  {
    flock 9 2>/dev/null || true
    setup ""
  } 9<"$PINS"
else
  choose_environment
fi
exec "$PY" "$REPO/launchers/ranks.py" --multinode "$@"
