# Sourced by the scripts of this repository, from its top folder: brings what is missing.
#
#   need_qemu            qemu-system-x86_64, qemu-storage-daemon, qemu-img, qemu-io
#   need_venv [EXTRA]    a virtual environment with the package and an extra of it (cli), in $VENV
#   need_guest           a kernel, busybox and guest agent for a real guest, in $GUEST
# shellcheck shell=bash

VENV=${QMPCOMMIT_VENV:-$PWD/.venv}
GUEST=${QMPCOMMIT_GUEST:-$PWD/.guest}

say() { printf '%s\n' "$*" >&2; }

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        say "this needs root: $*"
        exit 2
    fi
}

apt_install() {
    if ! command -v apt-get >/dev/null; then
        say "missing: $* (as Debian calls them). Install them and run this again:"
        say "  Fedora:        sudo dnf install qemu-system-x86-core qemu-img python3"
        say "  Arch:          sudo pacman -S qemu-base python"
        say "  openSUSE:      sudo zypper install qemu-x86 qemu-tools python311"
        say "  macOS (brew):  brew install qemu python (not tested; the tests need Linux)"
        exit 2
    fi
    say "installing: $*"
    export DEBIAN_FRONTEND=noninteractive
    as_root apt-get -q -y update >/dev/null || true
    as_root apt-get -q -y install --no-install-recommends "$@" >/dev/null
}

need_qemu() {
    local missing=()
    command -v qemu-system-x86_64 >/dev/null || missing+=(qemu-system-x86)
    command -v qemu-img >/dev/null && command -v qemu-io >/dev/null || missing+=(qemu-utils)
    if [ ${#missing[@]} -gt 0 ]; then apt_install "${missing[@]}"; fi
}

# The newest Python that is new enough, with a working venv module.
find_python() {
    local name
    for name in "${PYTHON:-python3}" python3.14 python3.13 python3.12 python3.11; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
}

need_venv() {
    local extra="[${1:-cli}]" python stamp want
    python=$(find_python)
    if [ -z "$python" ]; then
        apt_install python3 python3-venv
        python=$(find_python)
    fi
    if [ -z "$python" ]; then
        say "Python 3.11 or newer is needed; name it with PYTHON=/path/to/python3.11"
        exit 2
    fi
    stamp=$VENV/.qmpcommit-stamp
    want="$python $extra $PWD $(cksum <pyproject.toml)"
    if [ -x "$VENV/bin/python" ] && grep -qxF -- "$want" "$stamp" 2>/dev/null; then
        return
    fi
    if ! "$python" -m venv "$VENV" 2>/dev/null; then
        apt_install python3-venv
        "$python" -m venv --clear "$VENV"
    fi
    say "installing the package and what it needs into $VENV"
    "$VENV/bin/python" -m pip install -q -e ".$extra"
    printf '%s\n' "$want" >>"$stamp"
}

# Unpacks Debian's packages beside the system, so that nothing of them is installed on it.
# Without them the tests that need a guest are skipped, and say so.
need_guest() {
    local fetched kernel deb
    [ ! -d "$GUEST" ] || return 0
    if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then
        say "a real guest is unpacked from Debian's packages only; its tests are skipped"
        return 0
    fi
    PATH=$PATH:/usr/sbin:/sbin command -v debugfs >/dev/null || apt_install e2fsprogs
    say "unpacking a kernel, busybox and the guest agent into $GUEST"
    (as_root apt-get -q -y update) >/dev/null 2>&1 || true
    kernel=$(apt-cache depends linux-image-cloud-amd64 2>/dev/null |
        sed -n 's/^ *Depends: *\(linux-image-.*\)/\1/p' | head -n 1)
    fetched=$(mktemp -d)
    if (cd "$fetched" && apt-get -q download "${kernel:-linux-image-cloud-amd64}" \
        busybox-static qemu-guest-agent) >/dev/null 2>&1; then
        rm -rf "$GUEST.new"
        for deb in "$fetched"/*.deb; do dpkg-deb -x "$deb" "$GUEST.new"; done
        mv "$GUEST.new" "$GUEST"
    else
        say "the packages can't be had; the tests of a real guest are skipped"
    fi
    rm -rf "$fetched"
}
