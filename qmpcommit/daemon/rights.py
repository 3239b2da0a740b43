"""Who asks, and what they may do: roles for users, groups and tokens, each on VMs of its own.

``read`` sees VMs and what is done with them, ``operate`` commits and decides, ``admin`` may make
VMs known and have them forgotten. Root, the daemon's own user, and those that ``[listen]`` names
are admins of all.
"""

from __future__ import annotations

import asyncio
import grp
import hmac
import os
import pwd
import stat
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from contextvars import ContextVar
from fnmatch import fnmatchcase
from typing import NamedTuple

from starlette.exceptions import HTTPException

from qmpcommit.daemon.config import Config
from qmpcommit.daemon.connections import Peer
from qmpcommit.errors import InvalidRequest

ROLES = ("read", "operate", "admin")
"""Each may do what those before it may."""

KNOWN = 30.0
"""Seconds for which the groups of a user are taken as they were."""

NSS = 5.0
"""Seconds that the host gets to tell the groups of a user; then they are none."""

_TOKEN_BYTES = 4096


class Grant(NamedTuple):
    """A role on the VMs whose names match one of the patterns."""

    role: str
    vms: tuple[str, ...] = ("*",)


class Asker(NamedTuple):
    """Who asks for something: in words, and what they may."""

    who: str
    uid: int | None
    address: str
    grants: tuple[Grant, ...]

    def may(self, role: str, vms: Iterable[str]) -> bool:
        """Whether they have at least this role on all of these VMs."""
        patterns = [
            pattern
            for grant in self.grants
            if ROLES.index(grant.role) >= ROLES.index(role)
            for pattern in grant.vms
        ]
        return all(any(fnmatchcase(vm, pattern) for pattern in patterns) for vm in vms)

    @property
    def role(self) -> str:
        """The highest that they have on any VM."""
        return max((grant.role for grant in self.grants), key=ROLES.index, default="none")

    def told(self) -> dict[str, str | int | None]:
        """As the journal and the views have it."""
        return {"who": self.who, "uid": self.uid, "role": self.role, "address": self.address}


ASKER: ContextVar[Asker | None] = ContextVar("ASKER", default=None)
"""Who asked for what is being done; None where the daemon does it by itself."""


def asked_by(name: str = "asked") -> dict[str, dict[str, str | int | None]]:
    """What is noted of something new: who asks for it, where that is not the daemon."""
    asker = ASKER.get()
    return {} if asker is None else {name: asker.told()}


def sees(vms: str | Iterable[str]) -> bool:
    """Whether who asks may see these VMs (names, or one text with commas between them)."""
    asker = ASKER.get()
    names = vms.split(",") if isinstance(vms, str) else vms
    return asker is None or asker.may("read", names)


def has_everywhere(role: str) -> bool:
    """Whether who asks has at least this role on every VM that there ever is."""
    asker, rank = ASKER.get(), ROLES.index(role)
    return asker is None or any(
        "*" in grant.vms and ROLES.index(grant.role) >= rank for grant in asker.grants
    )


def sees_all() -> bool:
    """Whether who asks may see every VM that there ever is."""
    return has_everywhere("read")


def require(role: str, vms: Sequence[str]) -> None:
    """Refuse who has not this role on all these VMs: 404 for what they can't even see."""
    asker = ASKER.get()
    if asker is None or asker.may(role, vms):
        return
    if not asker.may("read", vms):
        raise HTTPException(404, f"{asker.who} sees no VM called {' or '.join(vms)}")
    raise HTTPException(
        403,
        f"{asker.who} may not do this with {', '.join(vms)}: it needs the role '{role}' there"
        " ([[access.grant]] in the daemon's configuration)",
    )


class Token:
    """A token in a file, which may be exchanged while the daemon runs."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._seen: tuple[int, ...] = ()
        self._text = b""
        self._read()

    def is_it(self, given: bytes) -> bool:
        """Whether this is what the file holds now."""
        with suppress(InvalidRequest):  # in the midst of being exchanged: the former one counts
            self._read()
        return hmac.compare_digest(given, b"Bearer " + self._text)

    def _read(self) -> None:
        """Read it again where it has changed; raises `InvalidRequest`."""
        path = self.path
        try:
            found = os.stat(path)
            seen = (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size, found.st_mode)
            if seen == self._seen:
                return
            with open(path, "rb") as file:
                token = file.read(_TOKEN_BYTES).decode("ascii").strip()
                if os.fstat(file.fileno()).st_mode & stat.S_IRWXO:
                    raise InvalidRequest(f"others may read the token file {path}: chmod o= {path}")
        except OSError as error:
            why = error.strerror
            raise InvalidRequest(f"the token file {path} can't be read: {why}") from None
        except UnicodeDecodeError:
            raise InvalidRequest(f"the token file {path} has more than ASCII in it") from None
        if len(token) < 16:
            raise InvalidRequest(f"the token in {path} is shorter than 16 characters")
        self._seen, self._text = seen, token.encode()


class Askers:
    """All who may use the API, as the configuration has them; raises `InvalidRequest`."""

    def __init__(self, config: Config) -> None:
        listen = config.listen
        whole = Grant("admin")
        self._users: dict[int, list[Grant]] = {0: [whole], os.geteuid(): [whole]}
        self._groups: dict[int, list[Grant]] = {}
        self._tokens: list[tuple[Token, Grant]] = []
        self._known: dict[tuple[int, int], tuple[float, frozenset[int]]] = {}
        self._asking: dict[tuple[int, int], asyncio.Future[frozenset[int]]] = {}
        for user in listen.users:
            self._users.setdefault(user_id(user), []).append(whole)
        for group in (*listen.groups, *([listen.group] if listen.group is not None else [])):
            self._groups.setdefault(group_id(group), []).append(whole)
        if listen.token_file is not None:
            self._tokens.append((Token(listen.token_file), whole))
        for each in config.access.grant if config.access is not None else ():
            grant = Grant(each.role, each.vms)
            for user in each.users:
                self._users.setdefault(user_id(user), []).append(grant)
            for group in each.groups:
                self._groups.setdefault(group_id(group), []).append(grant)
            self._tokens += [(Token(path), grant) for path in each.tokens]

    async def peer(self, peer: Peer) -> Asker | None:
        """Who is at the other end of a Unix socket; None for a stranger."""
        grants = [*self._users.get(peer.uid, ()), *self._groups.get(peer.gid, ())]
        if self._groups and Grant("admin") not in grants:
            for group in await self._groups_of(peer):
                if group != peer.gid:
                    grants += self._groups.get(group, ())
        if not grants:
            return None
        who = f"user {peer.uid}"
        return Asker(who, peer.uid, f"process {peer.pid}", tuple(grants))

    def bearer(self, given: bytes, address: str) -> Asker | None:
        """Who has this token; None for a stranger."""
        found = [(token, grant) for token, grant in self._tokens if token.is_it(given)]
        if not found:
            return None
        who = f"the bearer of {os.path.basename(found[0][0].path)}"
        return Asker(who, None, address, tuple(grant for _, grant in found))

    async def _groups_of(self, peer: Peer) -> frozenset[int]:
        """The supplementary groups that the host knows; it may be slow, and the loop goes on."""
        key = (peer.uid, peer.gid)
        when, groups = self._known.get(key, (0.0, frozenset[int]()))
        if not when or time.monotonic() - when > KNOWN:
            asking = self._asking.get(key)
            if asking is None:
                asking = self._asking[key] = _ask_host(key)
                asking.add_done_callback(lambda _: self._asking.pop(key, None))
            done, _ = await asyncio.wait({asking}, timeout=NSS)
            groups = asking.result() if done else frozenset()
            if len(self._known) > 1000:
                self._known.clear()
            self._known[key] = (time.monotonic(), groups)
        return groups


def _ask_host(key: tuple[int, int]) -> asyncio.Future[frozenset[int]]:
    """The groups of a user, by a thread for which nobody waits when the daemon ends."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[frozenset[int]] = loop.create_future()

    def tell(groups: frozenset[int]) -> None:
        if not answer.done():
            answer.set_result(groups)

    def ask() -> None:
        groups = _groups_of(*key)
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(tell, groups)

    threading.Thread(target=ask, name="nss", daemon=True).start()
    return answer


def _groups_of(uid: int, gid: int) -> frozenset[int]:
    with suppress(KeyError, OSError):
        return frozenset(os.getgrouplist(pwd.getpwuid(uid).pw_name, gid))
    return frozenset()


def user_id(name: str | int) -> int:
    """A user's number; raises `InvalidRequest`."""
    try:
        return name if isinstance(name, int) else pwd.getpwnam(name).pw_uid
    except KeyError:
        raise InvalidRequest(f"there is no user '{name}' on this host") from None


def group_id(name: str | int) -> int:
    """A group's number; raises `InvalidRequest`."""
    try:
        return name if isinstance(name, int) else grp.getgrnam(name).gr_gid
    except KeyError:
        raise InvalidRequest(f"there is no group '{name}' on this host") from None
