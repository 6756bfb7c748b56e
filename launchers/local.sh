#!/usr/bin/env bash
# Run any vae-ds command on all devices of this machine: bash launchers/local.sh [-n N] train RECIPE [ARGUMENTS ...]
# Sets up .venv first, unless an environment is active. Ctrl-C stops the ranks; the same command resumes.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$here/lib.sh"

setup ""
exec "$PY" "$REPO/launchers/ranks.py" "$@"
