"""The least that a script over qemu.qmp can do for a group keep at one instant."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from qemu.qmp import EventListener, QMPClient


class BareGroup:
    """Connected clients, and the disks of each by node-name; believes every reply."""

    def __init__(self, disks: Mapping[str, Sequence[str]]) -> None:
        self._disks = disks
        self._clients: dict[str, QMPClient] = {}
        self._round = 0

    async def open(self) -> None:
        """Connect all."""
        for path in self._disks:
            self._clients[path] = client = QMPClient()
            await client.connect(path)

    async def close(self) -> None:
        """Disconnect all."""
        for client in self._clients.values():
            await client.disconnect()

    async def keep(self) -> float:
        """One group keep; the longest hold in seconds, on QEMU's clock."""
        self._round += 1
        jobs = [(c, node, f"j{self._round}-{node}")
                for path, c in self._clients.items() for node in self._disks[path]]  # fmt: skip
        held: dict[str, float] = {}
        holds: list[float] = []
        listeners = {}
        for client in self._clients.values():
            listeners[client] = listener = EventListener()
            client.register_listener(listener)
        count = dict.fromkeys(self._clients.values(), 0)
        for client, _, _ in jobs:
            count[client] += 1

        async def until(client: QMPClient, name: str) -> None:
            left = count[client]
            while left:
                event: Any = await listeners[client].get()
                data, stamp = event["data"], event["timestamp"]
                at = stamp["seconds"] + stamp["microseconds"] / 1e6
                if data.get("status") == "waiting":
                    held[data["id"]] = at
                if event["event"] == "BLOCK_JOB_COMPLETED":
                    holds.append(at - held[data["device"]])
                left -= event["event"] == name

        async def all_at(name: str) -> None:
            await asyncio.gather(*(until(client, name) for client in listeners))

        async def send(command: str, key: str, **more: object) -> None:
            await asyncio.gather(*(c.execute(command, {key: j, **more}) for c, _, j in jobs))

        for client, node, job in jobs:
            arguments: dict[str, object] = {"job-id": job, "device": node, "auto-finalize": False}
            await client.execute("block-commit", arguments)
        await all_at("BLOCK_JOB_READY")
        await send("block-job-cancel", "device", force=False)
        await all_at("BLOCK_JOB_PENDING")
        await send("job-finalize", "id")
        await all_at("BLOCK_JOB_COMPLETED")
        for client, listener in listeners.items():
            client.remove_listener(listener)
        return max(holds)
