"""The daemon's configuration: right, or refused with the member that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from qmpcommit.daemon.config import MAX_CONFIG, Config, load, parse
from qmpcommit.errors import InvalidRequest
from qmpcommit.wire.values import check_name

WHOLE = b"""
state = "/srv/qmpcommit"
log = "json"
log_level = "debug"
commands = true
retain_days = 1.5
discover_every = "500ms"

[listen]
socket = "/run/q.sock"
mode = "0600"
group = "kvm"
users = ["alice", 1000]
groups = ["vms", 7]
tcp = "127.0.0.1:8080"
token_file = "/etc/token"

[limits]
commits = 3
per_vm = 1
per_storage = 2
bandwidth = "100MiB"
queue = 5
gone_after = "2min"
request_size = "1M"

[[discover]]
glob = "/run/vms/*/qmp.sock"
connect = "on-demand"

[[vm]]
name = "web1"
qmp = "tcp:127.0.0.1:4444"

[[flatten]]
vm = "web*"
keep = 2
depth = 8
overlay_size = "20GiB"
every = "5min"
bandwidth = "50MiB"
delete = true

[[cycle]]
vm = "web1"
disk = "vda"
at = "03:00"
keep_if = ["is-good", "web1"]
timeout = "2min"
overlay_dir = "/srv/overlays"
guest = "reset"
delete = true
freeze = "agent"
agent = "/run/vms/web1/agent.sock"
"""


def test_every_member_is_read() -> None:
    config = parse(WHOLE, "x")
    assert config.discover_every == 0.5
    assert config.listen.users == ("alice", 1000)
    assert config.limits.bandwidth == 100 << 20
    assert config.limits.gone_after == 120
    assert config.limits.request_size == 1 << 20
    assert config.discover[0].connect == "on-demand"
    assert config.vm[0].connect == "keep"
    rule = config.flatten[0]
    assert (rule.disk, rule.keep, rule.depth, rule.overlay_size) == ("*", 2, 8, 20 << 30)
    assert (rule.every, rule.bandwidth, rule.delete) == (300, 50 << 20, True)
    cycle = config.cycle[0]
    assert (cycle.every, cycle.at, cycle.timeout) == (None, "03:00", 120)
    assert cycle.keep_if == ("is-good", "web1")
    assert cycle.sockets(["web1"]) == {"web1": "/run/vms/web1/agent.sock"}
    assert parse(b"", "x") == Config()


TRUE = "['true']"
CYCLE = f"[[cycle]]\nvm = 'a'\ndisk = 'vda'\nkeep_if = {TRUE}\nguest = 'reset'\n"
WITH_B = "together = [{vm = 'b', disk = 'vda'}]"

WRONG = {
    "stat = 1": "stat: is not known here",
    "[limits]\ncommit = 1": "limits.commit: is not known here",
    "[limits]\ncommits = 0": "limits.commits: ",
    "[limits]\ncommits = '3'": "limits.commits: ",
    "[limits]\nper_vm = true": "limits.per_vm: ",
    "[limits]\nbandwidth = '5 apples'": "limits.bandwidth: .*'5 apples' is no size",
    "[limits]\nbandwidth = -1": "limits.bandwidth: ",
    "[limits]\nrequest_size = 0": "limits.request_size: ",
    "[limits]\nrequest_time = 0": "limits.request_time: ",
    "[limits]\ngone_after = inf": "limits.gone_after: ",
    "retain_days = nan": "retain_days: ",
    "retain_days = 0": "retain_days: ",
    "discover_every = 0": "discover_every: ",
    "log = 'xml'": "log: ",
    "state = ''": "state: ",
    "[listen]\nmode = '999'": "listen.mode: ",
    "[listen]\nsocket = ''": "listen.socket: ",
    '[listen]\nsocket = "a\\u0000b"': "listen.socket: .*NUL",
    "[listen]\ntcp = '0.0.0.0:80'\ntoken_file = 'x'": "listen.tcp: ",
    "[listen]\ntcp = '127.0.0.1:99999'\ntoken_file = 'x'": "listen: .*port",
    "[listen]\ntcp = '127.0.0.1:80'": "listen: .*needs a token_file",
    "[[vm]]\nname = 'a'": "vm.0.qmp: is missing",
    "[[vm]]\nname = 'a/b'\nqmp = '/q'": "vm.0.name: .*letter",
    "[[vm]]\nname = 'a'\nqmp = 'tcp:x'": "vm.0.qmp: .*HOST:PORT",
    "[[vm]]\nname = 'a'\nqmp = '/q'\nconnect = 'no'": "vm.0.connect: ",
    "[[vm]]\nname = 'a'\nqmp = '/q'\n[[vm]]\nname = 'a'\nqmp = '/r'": "top: .*several VMs.*a",
    "[[discover]]\nglob = '/run/vms/qmp.sock'": "discover.0.glob: .*\\*",
    "[[discover]]\nglob = 'vms/*/qmp.sock'": "discover.0.glob: .*absolute",
    "[[flatten]]\nkeep = 1\ndepth = 2": "flatten.0.vm: is missing",
    "[[flatten]]\nvm = 'a'\ndepth = 2": "flatten.0.keep: is missing",
    "[[flatten]]\nvm = 'a'\nkeep = 2": "flatten.0: .*depth, overlay_size or both",
    "[[flatten]]\nvm = 'a'\nkeep = 0\ndepth = 2": "flatten.0.keep: ",
    "[[flatten]]\nvm = 'a'\nkeep = 3\ndepth = 2": "flatten.0: .*for ever",
    "[[flatten]]\nvm = ''\nkeep = 3\ndepth = 3": "flatten.0.vm: ",
    "[[flatten]]\nvm = 'a'\nkeep = 1\noverlay_size = 'big'": "flatten.0.overlay_size: .*'big'",
    "[[flatten]]\nvm = 'a'\nkeep = 1\ndepth = 2\nevery = 0": "flatten.0.every: ",
    "[[cycle]]\nvm = 'a'": "cycle.0.disk: is missing",
    CYCLE: "cycle.0: .*every or at",
    f"{CYCLE}every = 5\nat = '03:00'": "cycle.0: .*every or at",
    f"{CYCLE}at = '24:00'": "cycle.0.at: ",
    f"{CYCLE}every = 0": "cycle.0.every: ",
    f"{CYCLE}every = 5\ntimeout = 0": "cycle.0.timeout: ",
    f"{CYCLE}every = 5\noverlay_dir = 'vms'": "cycle.0: .*absolute",
    f"{CYCLE.replace('reset', 'pause')}every = 5": "cycle.0.guest: ",
    f"{CYCLE.replace(TRUE, '[]')}every = 5": "cycle.0.keep_if: ",
    f"{CYCLE}every = 5\ntogether = [{{vm = 'a', disk = 'vda'}}]": "top: .*more than once: a vda",
    f"{CYCLE}every = 5\nfreeze = 'ice'": "cycle.0.freeze: ",
    f"{CYCLE}every = 5\nfreeze = 'agent'": "cycle.0: .*agents has no socket for a$",
    f"{CYCLE}every = 5\nfreeze = 'agent'\nagent = '/x'\n{WITH_B}": "cycle.0: .*one VM",
    f"{CYCLE}every = 5\nfreeze = 'agent'\nagents = {{a = '/x'}}\n{WITH_B}": "cycle.0: .*for b$",
    f"{CYCLE}every = 5\ntogether = [{{vm = 'b'}}]": "cycle.0.together.0.disk: is missing",
    f"{CYCLE}every = 5\ntogether = [{{vm = 'a', disk = 'b'}}, {{vm = 'a', disk = 'c'}}]": (
        "top: .*vda of a commits 3 disks at once, and limits.per_vm is 2"
    ),
    f"{CYCLE}every = 5\n{CYCLE}every = 6": "top: .*more than once: a vda",
    "x = [": "is no TOML",
    "a = 1\na = 2": "is no TOML",
}


@pytest.mark.parametrize("text", WRONG, ids=lambda text: text.replace("\n", " "))
def test_what_is_wrong_is_named(text: str) -> None:
    with pytest.raises(InvalidRequest, match=r"(?s)the configuration x.*" + WRONG[text]):
        parse(text.encode(), "x")


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="is no TOML"):
        parse(b"x = " + b"[" * 100_000, "x")


def test_a_file_that_can_not_be_read_is_named(folder: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"absent\.toml can't be read: No such file"):
        load(folder / "absent.toml")
    with pytest.raises(InvalidRequest, match="can't be read: Is a directory"):
        load(folder)
    large = folder / "large.toml"
    large.write_bytes(b"#" * (MAX_CONFIG + 1))
    with pytest.raises(InvalidRequest, match="larger than"):
        load(large)
    large.write_bytes(b"# \xff")
    with pytest.raises(InvalidRequest, match="not UTF-8"):
        load(large)


@pytest.mark.parametrize("name", ["web1", "A", "0", "a.b-c_d", "x" * 64])
def test_a_name_for_a_vm(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "a b", "a\n", "-a", "x" * 65, "é", "a\0", "a%2fb", "١"]
)
def test_no_name_for_a_vm(name: str) -> None:
    with pytest.raises(ValueError, match="a VM's name is"):
        check_name(name)
