# Sourced by what unpacks packages of other Debian suites beside the system's own.
#
# Packages come from the mirror that this machine's apt is configured for, with its own keys and
# proxies; apt's and dpkg's state stay untouched, and root is not needed.
# shellcheck shell=bash

KEYS=/usr/share/keyrings/debian-archive-keyring.gpg

say() { printf '%s\n' "$*" >&2; }

# need_debian: end, and say why, where this is no such machine; else $MIRROR is known.
need_debian() {
    local tool
    for tool in apt-get dpkg-deb; do
        command -v "$tool" >/dev/null || { say "$tool is missing: this needs Debian's tools"; exit 1; }
    done
    [ -f "$KEYS" ] || { say "$KEYS is missing: install debian-archive-keyring"; exit 1; }
    MIRROR=$(mirror)
    [ -n "$MIRROR" ] || { say "apt is configured for no mirror of Debian"; exit 1; }
}

# The machine's mirror of Debian itself (not of its security updates).
mirror() {
    apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(COMPONENT) $(CREATED_BY) $(ORIGIN)' |
        awk '$3 == "main" && $4 == "Packages" && $5 == "Debian" &&
             $2 !~ /security|updates|backports/ { print $1; exit }'
}

# look STATE SUITE: what that suite has, for `apt-get "${APT[@]}"` and `apt-cache "${APT[@]}"`.
look() {
    local state=$1 suite=$2
    mkdir -p "$state"/{etc,lists/partial,cache/archives/partial}
    : >"$state/status"
    echo "deb [signed-by=$KEYS arch=amd64] $MIRROR $suite main" >"$state/etc/sources.list"
    APT=(-o Dir::Etc::SourceList="$state/etc/sources.list" -o Dir::Etc::SourceParts=/dev/null
        -o Dir::Etc::Preferences=/dev/null -o Dir::Etc::PreferencesParts=/dev/null
        -o Dir::State="$state" -o Dir::State::Lists="$state/lists"
        -o Dir::State::status="$state/status"
        -o Dir::Cache="$state/cache" -o Dir::Cache::archives="$state/cache/archives"
        -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= -o Dir::Log="$state"
        -o APT::Install-Recommends=false -o APT::Sandbox::User=root -o Acquire::Languages=none
        -o Acquire::Check-Valid-Until=false -o APT::Keep-Downloaded-Packages=true
        -o APT::Architecture=amd64 -o APT::Architectures=amd64
        -o APT::Update::Post-Invoke= -o DPkg::Post-Invoke=)
    apt-get -q "${APT[@]}" update
}

# download PACKAGE ...: with all that they depend on, into STATE/cache/archives.
download() { apt-get -q -y "${APT[@]}" --download-only install "$@"; }

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


# why LOG: what apt complained of, without addresses.
why() { grep '^E:' "$1" | sed 's|http[^ ]* ||' | tail -n 1; }

# loader ROOT: the dynamic loader of an unpacked tree.
loader() {
    local libraries=$1/usr/lib/x86_64-linux-gnu found
    found=$libraries/ld-linux-x86-64.so.2
    # Older suites link the loader by an absolute name, into the machine's own tree.
    [ -f "$found" ] && [ ! -L "$found" ] ||
        found=$(find "$libraries" "$1/usr/lib64" -name 'ld-*.so*' -type f | head -n 1)
    echo "$found"
}
