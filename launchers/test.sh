#!/usr/bin/env bash
# Set up the environment and run the tests. The arguments go to pytest: bash launchers/test.sh [-k NAME ...]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$here/lib.sh"

# Programs that some tests need. Without them, these tests are skipped with a message.
install_programs slurmctld=slurm-wlm munged=munge pdsh=pdsh ip=iproute2 nsenter=util-linux /usr/include/libaio.h=libaio-dev \
  /usr/share/wordnet/data.noun=wordnet-base
setup test,dev,docs
cd "$REPO"
# Run three test files at a time: many of them wait for processes to start or to end.
# -c selects the settings of this repository in any directory; without them the tests would have no timeouts.
exec "$PY" -m pytest -c "$REPO/pyproject.toml" -n 3 --dist loadfile --no-loadscope-reorder "$@"
