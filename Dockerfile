# qmpcommit as a command in a container. The monitor's socket is mounted in:
#
#   docker build -t qmpcommit .
#   docker run --rm -v /run/vms/web1:/run/vms/web1 qmpcommit chain /run/vms/web1/qmp.sock
#
# QEMU itself stays outside: qmpcommit only talks to its monitor. Run it as the user that may
# open the socket (--user), and with --pid=host if file names relative to QEMU's working
# directory have to be understood.

FROM python:3.13-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY qmpcommit ./qmpcommit
RUN pip wheel --no-cache-dir --wheel-dir /wheels .

FROM python:3.13-slim
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-index --find-links=/wheels qmpcommit \
 && useradd --system --no-create-home --shell /usr/sbin/nologin qmpcommit
USER qmpcommit
ENTRYPOINT ["qmpcommit"]
CMD ["--help"]
