# qmpcommit in a container: the daemon, and the command.
#
#   docker build -t qmpcommit .
#
# The daemon, for the VMs whose monitors are /run/vms/NAME/qmp.sock:
#
#   docker run -d --name qmpcommitd --pid=host -v /run/vms:/run/vms \
#       -v qmpcommit-state:/var/lib/qmpcommit -v qmpcommit-run:/run/qmpcommit qmpcommit
#
# The command:
#
#   docker run --rm -v /run/vms/web1:/run/vms/web1 qmpcommit chain /run/vms/web1/qmp.sock
#
# QEMU itself stays outside: qmpcommit only talks to its monitor. Users and groups are numbers here,
# and their names are those of the image:
#
#   * The monitors' sockets: connecting takes write permission on each. Run it with the number of
#     their group (--group-add "$(stat -c %g /run/vms/web1/qmp.sock)"), or as their owner (--user).
#   * The API's socket, /run/qmpcommit/qmpcommitd.sock, is of the daemon's user and group (999:999 in
#     this image), mode 0660. Who is to use it from the host needs that group's number, or a group in
#     common: give it with --group-add and name its number in [listen] group. [listen] users and
#     groups, and [access], compare the numbers of who connects: name them as numbers. With a user
#     namespace (userns-remap, rootless) these are the numbers as the container sees them.
#
# docker stop: the daemon hands over within 2 s, and jobs stay in QEMU. Only where it has frozen a
# guest whose agent does not answer it tries for 30 s to thaw it: docker stop --time 45, and
# docker run --stop-timeout 45. With --pid=host it can tell one QEMU process from its
# successor, and understands file names relative to QEMU's working directory. Mount the folders
# of the images under the same names where stale overlays are to be deleted. For a configuration
# of your own: -v /etc/qmpcommit:/etc/qmpcommit:ro.

# To pin it: --build-arg BASE=python:3.13-slim@sha256:..., as "docker buildx imagetools inspect
# python:3.13-slim" tells it.
ARG BASE=python:3.13-slim

FROM ${BASE} AS build
WORKDIR /src
COPY pyproject.toml hatch_build.py README.md LICENSE constraints.txt ./
COPY qmpcommit ./qmpcommit
RUN pip wheel --no-cache-dir --constraint constraints.txt --wheel-dir /wheels ".[daemon]"

FROM ${BASE}
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="qmpcommit" \
      org.opencontainers.image.description="Live block commit over QMP: a daemon and a command for QEMU without libvirt" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.licenses="MIT"
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-index --find-links=/wheels "qmpcommit[daemon]" \
 && groupadd --gid 999 qmpcommit \
 && useradd --uid 999 --gid 999 --no-create-home --shell /usr/sbin/nologin qmpcommit \
 && install -d -o qmpcommit -g qmpcommit /var/lib/qmpcommit /run/qmpcommit
COPY examples/daemon/config.toml /etc/qmpcommit/config.toml
USER qmpcommit
STOPSIGNAL SIGTERM
VOLUME /var/lib/qmpcommit
# The daemon's own socket, asked by its own user; 1 where nobody answers.
HEALTHCHECK --interval=30s --timeout=5s --start-period=10s CMD ["python", "-c", "\
import socket\n\
sock = socket.socket(socket.AF_UNIX)\n\
sock.settimeout(4)\n\
sock.connect('/run/qmpcommit/qmpcommitd.sock')\n\
sock.sendall(b'GET /healthz HTTP/1.0\\r\\n\\r\\n')\n\
answer = sock.recv(64)\n\
sock.close()\n\
raise SystemExit(b' 200 ' not in answer)\n"]
ENTRYPOINT ["qmpcommit"]
CMD ["daemon", "--config", "/etc/qmpcommit/config.toml"]
