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
# QEMU itself stays outside: qmpcommit only talks to its monitor. Run it as a user that may open
# the sockets (--user, --group-add). With --pid=host it can tell one QEMU process from its
# successor, and understands file names relative to QEMU's working directory. Mount the folders
# of the images under the same names where stale overlays are to be deleted. For a configuration
# of your own: -v /etc/qmpcommit:/etc/qmpcommit:ro.

FROM python:3.13-slim AS build
WORKDIR /src
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY qmpcommit ./qmpcommit
RUN pip wheel --no-cache-dir --wheel-dir /wheels ".[daemon]"

FROM python:3.13-slim
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-index --find-links=/wheels "qmpcommit[daemon]" \
 && useradd --system --user-group --no-create-home --shell /usr/sbin/nologin qmpcommit \
 && install -d -o qmpcommit -g qmpcommit /var/lib/qmpcommit /run/qmpcommit
COPY examples/daemon/config.toml /etc/qmpcommit/config.toml
USER qmpcommit
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
