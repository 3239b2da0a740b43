#!/usr/bin/env bash
# Unpacks the QEMU of other Debian suites beside the system's own.
#
#   ./tests/other_qemus.sh FOLDER SUITE [SUITE ...]
#
# FOLDER/SUITE gets the packages with all that they depend on, nothing of it configured, and
# FOLDER/bin the commands as NAME-SUITE (qemu-system-x86_64-trixie, ...). Packages come from the
# mirror that this machine's apt is configured for, with its own keys and proxies; apt's and
# dpkg's state stay untouched, and root is not needed. Takes 50 MiB and about ten seconds a suite.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/debian.sh"

PROGRAMS=(qemu-system-x86_64 qemu-storage-daemon qemu-img qemu-io qemu-nbd)

# wrap ROOT SUITE: commands that run with the tree's own loader, libraries and firmware.
wrap() {
    local root=$1 suite=$2 libraries=$1/usr/lib/x86_64-linux-gnu loader program options
    loader=$(loader "$root")
    for program in "${PROGRAMS[@]}"; do
        [ -x "$root/usr/bin/$program" ] || continue
        options=
        if [ "$program" = qemu-system-x86_64 ]; then
            options="-L '$root/usr/share/qemu' -L '$root/usr/share/seabios'"
        fi
        cat >"$FOLDER/bin/$program-$suite" <<WRAPPER
#!/bin/sh
export QEMU_MODULE_DIR='$libraries/qemu'
exec '$loader' --library-path '$libraries:$libraries/pulseaudio:$libraries/ceph:$root/usr/lib' \\
    '$root/usr/bin/$program' $options "\$@"
WRAPPER
        chmod +x "$FOLDER/bin/$program-$suite"
    done
}

bring() {
    local suite=$1 root=$FOLDER/$1 state=$FOLDER/.apt-$1
    if "$FOLDER/bin/qemu-system-x86_64-$suite" --version >/dev/null 2>&1; then return; fi
    rm -rf "$root" "$state"
    if ! { look "$state" "$suite" && download qemu-system-x86 qemu-utils; } >"$state.log" 2>&1; then
        say "$suite: the packages can't be had: $(why "$state.log")"
        return 1
    fi
    unpack "$state" "$root"
    wrap "$root" "$suite"
    rm -rf "$state" "$state.log"
    "$FOLDER/bin/qemu-system-x86_64-$suite" --version >/dev/null
}

if [ $# -lt 2 ]; then
    say "usage: $0 FOLDER SUITE [SUITE ...]"
    exit 2
fi
FOLDER=$(realpath -m "$1")
shift
need_debian
mkdir -p "$FOLDER/bin"
for suite in "$@"; do
    bring "$suite"
done
