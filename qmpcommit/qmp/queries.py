"""The typed queries of a monitor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from qmpcommit.errors import ProtocolViolation, QmpCommitError

if TYPE_CHECKING:
    from qmpcommit.qmp import schema
    from qmpcommit.qmp.features import Features

    R = TypeVar("R", bound=schema.Return)

_ENTRIES = {"query-jobs": "id", "query-block-jobs": "device", "query-named-block-nodes": None}
"""Of answers that are lists and are read as they come: the name that each entry has."""


def check_form(vm: str, command: str, reply: object) -> None:
    """Raise `ProtocolViolation` where an answer that is read as it comes can't be QEMU's."""
    if command in _ENTRIES:
        name = _ENTRIES[command]
        right = isinstance(reply, list) and all(
            isinstance(entry, dict) and (name is None or isinstance(entry.get(name), str))
            for entry in reply
        )
    else:
        right = command != "query-status" or isinstance(reply, dict)
    if not right:
        raise ProtocolViolation(
            f"what {vm} answered to {command} is not what QEMU's schema says. What answers there"
            " is perhaps no QEMU",
            vm=vm,
            command=command,
        )


class Queries(ABC):
    """What can be asked of QEMU with a typed answer.

    Each raises what `execute` raises, and `ProtocolViolation` for a reply that is not what
    QEMU's schema says.
    """

    name: str
    _features: Features | None = None

    @abstractmethod
    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, **more: object
    ) -> Any:
        """Run one QMP command and return its value."""

    async def features(self) -> Features:
        """What this QEMU can do, from ``query-qmp-schema``, asked once a process."""
        if self._features is None:
            from qmpcommit.qmp.features import Features

            reply = await self.execute("query-qmp-schema")
            with self.sensible("query-qmp-schema"):
                self._features = Features.from_schema(reply)
        return self._features

    @contextmanager
    def sensible(self, command: str) -> Iterator[None]:
        """Raise `ProtocolViolation` for what can't be read of a reply within the block."""
        try:
            yield
        except QmpCommitError:
            raise
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise ProtocolViolation(
                f"what {self.name} answered to {command} is not what QEMU's schema says:"
                f" {error!r}. What answers there is perhaps no QEMU",
                vm=self.name,
                command=command,
            ) from error

    async def query_block(self) -> list[schema.BlockInfo]:
        """``query-block``: the guest's devices and their media."""
        from qmpcommit.qmp.schema import BlockInfo

        return await self._list(BlockInfo, "query-block")

    async def query_named_block_nodes(self) -> list[schema.BlockDeviceInfo]:
        """``query-named-block-nodes``, flat where QEMU offers it."""
        from qmpcommit.qmp.schema import BlockDeviceInfo

        flat = (await self.features()).has_argument("query-named-block-nodes", "flat")
        arguments = {"flat": True} if flat else None
        return await self._list(BlockDeviceInfo, "query-named-block-nodes", arguments)

    async def query_block_jobs(self) -> list[schema.BlockJobInfo]:
        """``query-block-jobs``."""
        from qmpcommit.qmp.schema import BlockJobInfo

        return await self._list(BlockJobInfo, "query-block-jobs")

    async def query_block_exports(self) -> list[schema.BlockExportInfo]:
        """``query-block-exports``."""
        from qmpcommit.qmp.schema import BlockExportInfo

        return await self._list(BlockExportInfo, "query-block-exports")

    async def query_jobs(self) -> list[schema.JobInfo]:
        """``query-jobs``."""
        from qmpcommit.qmp.schema import JobInfo

        return await self._list(JobInfo, "query-jobs")

    async def query_status(self) -> schema.StatusInfo:
        """``query-status``; qemu-storage-daemon has none (`CommandRefused`)."""
        from qmpcommit.qmp.schema import StatusInfo

        return self._typed(StatusInfo, "query-status", await self.execute("query-status"))

    async def query_version(self) -> schema.VersionInfo:
        """``query-version``."""
        from qmpcommit.qmp.schema import VersionInfo

        return self._typed(VersionInfo, "query-version", await self.execute("query-version"))

    async def query_qmp_schema(self) -> list[schema.SchemaInfo]:
        """``query-qmp-schema``; `features` answers questions about it."""
        from qmpcommit.qmp.schema import SchemaInfo

        return await self._list(SchemaInfo, "query-qmp-schema")

    async def _list(
        self, model: type[R], command: str, arguments: Mapping[str, object] | None = None
    ) -> list[R]:
        reply = await self.execute(command, arguments)
        if not isinstance(reply, list):
            reply = [reply]  # which is not valid either
        return [self._typed(model, command, item) for item in reply]

    def _typed(self, model: type[R], command: str, value: object) -> R:
        from pydantic import ValidationError

        try:
            return model.model_validate(value)
        except ValidationError as error:
            raise ProtocolViolation(
                f"what {self.name} answered to {command} is not what QEMU's schema says: {error}",
                vm=self.name,
                command=command,
            ) from None
