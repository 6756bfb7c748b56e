#!/usr/bin/env bash
# Sets everything up and passes the tests; arguments go to pytest: bash launchers/test.sh [-k NAME ...]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$here/lib.sh"

# Real programs that some tests need; without them those tests say so and are skipped.
install_programs slurmctld=slurm-wlm munged=munge pdsh=pdsh ip=iproute2 nsenter=util-linux /usr/include/libaio.h=libaio-dev \
  /usr/share/wordnet/data.noun=wordnet-base
setup test,dev
cd "$REPO"
# Two files of tests at a time: most of them wait for processes to start or to end.
# Only tests are named by default; a run under another directory's settings would miss the timeouts.
exec "$PY" -m pytest -c "$REPO/pyproject.toml" -n 2 --dist loadfile --no-loadscope-reorder "$@"
