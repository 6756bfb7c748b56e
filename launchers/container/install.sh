#!/usr/bin/env bash
# Install vae_ds with pinned packages into an image. Dockerfile and vae_ds.def run it: install.sh SOURCE, as root.
set -euo pipefail
source=$1
env=/opt/vae_ds

# Headers and compilers: DeepSpeed and torch.compile build operators on the machine that runs them. The image has no
# operator built in advance, because one that was built for the processor of the build machine fails on an older one.
export DEBIAN_FRONTEND=noninteractive
apt-get update --quiet=2
apt-get install --quiet=2 --yes --no-install-recommends ca-certificates g++ libaio-dev python3-dev python3-venv
rm -rf /var/lib/apt/lists/*

python3 -m venv "$env"
pip() { "$env/bin/python" -m pip --disable-pip-version-check --no-input "$@"; }
export PIP_NO_CACHE_DIR=1 PIP_PROGRESS_BAR=off
pip install --constraint "$source/launchers/constraints.txt" setuptools packaging
pip install --constraint "$source/launchers/constraints.txt" --no-build-isolation "$source"
pip check
