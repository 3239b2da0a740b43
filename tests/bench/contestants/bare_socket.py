"""The floor: a blocking socket and json, nothing else: ``bare_socket.py QMP NODE``."""

import json
import socket
import sys

sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
lines = sock.makefile("rwb")


def send(command: str, **arguments: object) -> None:
    """One command, without waiting for its reply."""
    lines.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
    lines.flush()


lines.readline()
send("qmp_capabilities")
send("block-commit", **{"job-id": "j", "device": sys.argv[2]})
for line in lines:
    name = json.loads(line).get("event")
    if name == "BLOCK_JOB_READY":
        send("job-complete", id="j")
    elif name == "BLOCK_JOB_COMPLETED":
        break
