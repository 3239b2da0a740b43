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

PROGRAMS=(qemu-system-x86_64 qemu-storage-daemon qemu-img qemu-io qemu-nbd)
KEYS=/usr/share/keyrings/debian-archive-keyring.gpg

say() { printf '%s\n' "$*" >&2; }

# The machine's mirror of Debian itself (not of its security updates).
mirror() {
    apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(COMPONENT) $(CREATED_BY) $(ORIGIN)' |
        awk '$3 == "main" && $4 == "Packages" && $5 == "Debian" &&
             $2 !~ /security|updates|backports/ { print $1; exit }'
}

# download STATE SUITE: the packages' closure, into STATE/cache/archives.
download() {
    local state=$1 suite=$2 apt
    mkdir -p "$state"/{etc,lists/partial,cache/archives/partial}
    : >"$state/status"
    echo "deb [signed-by=$KEYS arch=amd64] $MIRROR $suite main" >"$state/etc/sources.list"
    apt=(apt-get -q -y
        -o Dir::Etc::SourceList="$state/etc/sources.list" -o Dir::Etc::SourceParts=/dev/null
        -o Dir::Etc::Preferences=/dev/null -o Dir::Etc::PreferencesParts=/dev/null
        -o Dir::State="$state" -o Dir::State::Lists="$state/lists"
        -o Dir::State::status="$state/status"
        -o Dir::Cache="$state/cache" -o Dir::Cache::archives="$state/cache/archives"
        -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= -o Dir::Log="$state"
        -o APT::Install-Recommends=false -o APT::Sandbox::User=root -o Acquire::Languages=none
        -o Acquire::Check-Valid-Until=false -o APT::Keep-Downloaded-Packages=true
        -o APT::Architecture=amd64 -o APT::Architectures=amd64
        -o APT::Update::Post-Invoke= -o DPkg::Post-Invoke=)
    "${apt[@]}" update && "${apt[@]}" --download-only install qemu-system-x86 qemu-utils
}

# unpack STATE ROOT: with a merged /usr, whatever the packages' age.
unpack() {
    local state=$1 root=$2 folder package
    for folder in bin sbin lib lib64; do
        mkdir -p "$root/usr/$folder"
        ln -s "usr/$folder" "$root/$folder"
    done
    for package in "$state"/cache/archives/*.deb; do
        dpkg-deb --fsys-tarfile "$package" |
            tar -x -C "$root" --keep-directory-symlink --no-same-owner \
                --exclude=./usr/share/doc --exclude=./usr/share/man --exclude=./usr/share/locale
    done
}

# wrap ROOT SUITE: commands that run with the tree's own loader, libraries and firmware.
wrap() {
    local root=$1 suite=$2 libraries=$1/usr/lib/x86_64-linux-gnu loader program options
    loader=$libraries/ld-linux-x86-64.so.2
    # Older suites link the loader by an absolute name, into the machine's own tree.
    [ -f "$loader" ] && [ ! -L "$loader" ] ||
        loader=$(find "$libraries" "$root/usr/lib64" -name 'ld-*.so*' -type f | head -n 1)
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
    if ! download "$state" "$suite" >"$state.log" 2>&1; then
        say "$suite: the packages can't be had: $(grep '^E:' "$state.log" | sed 's|http[^ ]* ||' | tail -n 1)"
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
for tool in apt-get dpkg-deb; do
    command -v "$tool" >/dev/null || { say "$tool is missing: this needs Debian's tools"; exit 1; }
done
[ -f "$KEYS" ] || { say "$KEYS is missing: install debian-archive-keyring"; exit 1; }
MIRROR=$(mirror)
[ -n "$MIRROR" ] || { say "apt is configured for no mirror of Debian"; exit 1; }
mkdir -p "$FOLDER/bin"
for suite in "$@"; do
    bring "$suite"
done
