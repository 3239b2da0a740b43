#!/usr/bin/env bash
# All tests, with everything that they need: QEMU, Python packages, a virtual environment.
#
#   ./tests/run.sh [PYTEST ARGUMENT ...]
#
# On Debian and Ubuntu what is missing is installed with apt-get (by sudo where you are not
# root); elsewhere it is named. The environment is .venv, or $QMPCOMMIT_VENV; it is filled again
# when pyproject.toml has changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. examples/setup.sh

need_qemu
need_venv test
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
"$VENV/bin/mypy" --strict qmpcommit tests examples
exec "$VENV/bin/python" -m pytest "$@"
