#!/bin/sh
# Set qmpcommitd up as a service of systemd, with its own user and socket. Run it as root:
#
#   ./examples/daemon/setup-systemd.sh
#
# It makes a Python environment in /opt/qmpcommit, unless QMPCOMMITD names an installed qmpcommitd;
# an existing configuration is kept. With DESTDIR it only lays the files out there, for a package.
set -eu
cd "$(dirname "$0")/../.."

destdir=${DESTDIR:-}
if [ -z "${QMPCOMMITD:-}" ]; then
    python3 -m venv "$destdir/opt/qmpcommit"
    "$destdir/opt/qmpcommit/bin/pip" install --quiet ".[daemon]"
    QMPCOMMITD=/opt/qmpcommit/bin/qmpcommitd
fi

units=qmpcommit/daemon/system
put() { # MODE FROM TO
    install -D -m "$1" "$2" "$destdir$3"
}
put 644 $units/sysusers.conf /usr/lib/sysusers.d/qmpcommit.conf
put 644 $units/tmpfiles.conf /usr/lib/tmpfiles.d/qmpcommit.conf
put 644 $units/qmpcommitd.socket /etc/systemd/system/qmpcommitd.socket
put 644 $units/qmpcommitd.service /etc/systemd/system/qmpcommitd.service
sed -i "s|^ExecStart=/usr/bin/qmpcommitd|ExecStart=$QMPCOMMITD|" \
    "$destdir/etc/systemd/system/qmpcommitd.service"
[ -n "$destdir" ] || systemd-sysusers qmpcommit.conf
[ -e "$destdir/etc/qmpcommit/config.toml" ] ||
    put 640 examples/daemon/config.toml /etc/qmpcommit/config.toml
if [ -n "$destdir" ]; then
    echo "laid out in $destdir"
    exit 0
fi

systemd-tmpfiles --create qmpcommit.conf
chgrp qmpcommit /etc/qmpcommit/config.toml
# As the service's user, who can't run a Python that lives in somebody's home.
runuser -u qmpcommit -- "$QMPCOMMITD" --config /etc/qmpcommit/config.toml --check-config
systemctl daemon-reload
systemctl enable --now qmpcommitd.socket qmpcommitd.service
echo "qmpcommitd serves; try: curl --unix-socket /run/qmpcommit/qmpcommitd.sock http://d/v1/vms"
