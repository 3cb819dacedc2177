#!/bin/sh
# Image build: a virtual environment at /opt/venv with exactly the locked wheels of requirements file $1, and no trace of the installer.
set -eu
python3 -m venv /tmp/uv
/tmp/uv/bin/python -m pip install --quiet --no-cache-dir --disable-pip-version-check \
    --require-hashes --only-binary :all: -r "$(dirname "$0")/uv.txt"
/tmp/uv/bin/uv venv --quiet --no-python-downloads /opt/venv
/tmp/uv/bin/uv pip sync --quiet --no-cache --no-build --require-hashes --compile-bytecode --python /opt/venv "$1"
rm -rf /tmp/uv
