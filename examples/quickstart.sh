#!/usr/bin/env bash
# The main job on a real QEMU, start to end, with proof.
#
#   ./examples/quickstart.sh [--storage-daemon] [--keep-files] [--json]
#
# On Debian and Ubuntu what is missing is installed with apt-get (by sudo where you are not
# root); elsewhere it is named, and the script ends with status 2. The package goes into .venv
# in this repository, or into $QMPCOMMIT_VENV. The second time nothing is left to install.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. examples/setup.sh

need_qemu
need_venv
exec "$VENV/bin/qmpcommit" demo "$@"
