#!/usr/bin/env bash
# Unpacks the newest Pythons that Debian has beside the system's own.
#
#   ./tests/other_pythons.sh FOLDER [VERSION ...]
#
# Every Python from 3.11 on that the suite "sid" offers, but for the VERSIONs (3.11, ...) that are
# there already, goes into FOLDER/sid, from packages as `debian.sh` gets them; the path of each is
# printed, and `PATH -m venv` makes environments of it. Takes 70 MiB and about half a minute.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/debian.sh"

SUITE=sid

# The versions that are offered and not there.
wanted() {
    apt-cache "${APT[@]}" --names-only search '^python3\.[0-9]+-venv$' |
        sed -n 's/^python\(3\.[0-9]*\)-venv .*/\1/p' | sort -V | while read -r version; do
        case " $* " in *" $version "*) continue ;; esac
        if [ "${version#3.}" -ge 11 ]; then echo "$version"; fi
    done
}

# wrap ROOT VERSION: the program itself becomes a script, which environments link to. It runs with
# the tree's own loader and libraries, and looks for its environment where it was called.
wrap() {
    local program=$1/usr/bin/python$2
    mv "$program" "$program.bin"
    cat >"$program" <<WRAPPER
#!/bin/sh
exec '$(loader "$1")' --argv0 "\$0" --library-path '$1/usr/lib/x86_64-linux-gnu' \\
    '$program.bin' "\$@"
WRAPPER
    chmod +x "$program"
}

bring() {
    local root=$FOLDER/$SUITE state=$FOLDER/.apt-$SUITE version
    rm -rf "$root" "$state"
    if ! look "$state" "$SUITE" >"$state.log" 2>&1; then
        say "newer Pythons can't be had: $(why "$state.log")"
        return 1
    fi
    mapfile -t VERSIONS < <(wanted "$@")
    if [ ${#VERSIONS[@]} -gt 0 ]; then
        local packages=()
        for version in "${VERSIONS[@]}"; do packages+=("python$version" "python$version-venv"); done
        if ! download "${packages[@]}" >"$state.log" 2>&1; then
            say "newer Pythons can't be had: $(why "$state.log")"
            return 1
        fi
        unpack "$state" "$root"
        for version in "${VERSIONS[@]}"; do
            wrap "$root" "$version"
            # Where Debian has put the pip that new environments get.
            sed -i "s|/usr/share/python-wheels|$root&|" \
                "$root/usr/lib/python$version"/_sysconfigdata*.py
        done
    fi
    rm -rf "$state" "$state.log"
    printf '%s\n' "${VERSIONS[@]}" >"$FOLDER/versions"
}

if [ $# -lt 1 ]; then
    say "usage: $0 FOLDER [VERSION ...]"
    exit 2
fi
mkdir -p "$1"
FOLDER=$(realpath "$1")
shift
if [ ! -f "$FOLDER/versions" ]; then
    need_debian
    bring "$@"
fi
for version in $(<"$FOLDER/versions"); do
    echo "$FOLDER/$SUITE/usr/bin/python$version"
done
