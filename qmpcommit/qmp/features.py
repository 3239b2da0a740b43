"""What this QEMU can do, asked of ``query-qmp-schema``, never guessed from its version."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Self


class Features(NamedTuple):
    """An index over the schema's entries (SchemaInfo), looked into as it is asked.

    Made without pydantic, and a named tuple as that is the cheapest frozen class there is: a
    commit asks it before it sends anything. QEMU's names are unique, types' (``"217"``) included.
    """

    entries: Mapping[str, Mapping[str, Any]]

    @classmethod
    def from_schema(cls, entries: Iterable[Mapping[str, Any]]) -> Self:
        """From what ``query-qmp-schema`` returned."""
        return cls({str(entry.get("name")): entry for entry in entries})

    def has_command(self, name: str) -> bool:
        """Whether QEMU has this command."""
        return self._kind(name) == "command"

    def has_event(self, name: str) -> bool:
        """Whether QEMU can emit this event."""
        return self._kind(name) == "event"

    def has_argument(self, command: str, argument: str) -> bool:
        """Whether the command takes this argument, in any variant."""
        if not self.has_command(command):
            return False
        return argument in self._members(str(self.entries[command].get("arg-type")), set())

    def is_deprecated(self, command: str) -> bool:
        """Whether QEMU marks the command as deprecated."""
        if not self.has_command(command):
            return False
        return "deprecated" in self.entries[command].get("features", ())

    def _kind(self, name: str) -> str:
        return str(self.entries.get(name, {}).get("meta-type", ""))

    def _members(self, name: str, seen: set[str]) -> set[str]:
        """The members of an object type, its variants' included."""
        if name in seen or name not in self.entries:
            return set()
        seen.add(name)
        entry = self.entries[name]
        members = {str(member.get("name")) for member in entry.get("members", ())}
        for variant in entry.get("variants", ()):
            members |= self._members(str(variant.get("type")), seen)
        return members
