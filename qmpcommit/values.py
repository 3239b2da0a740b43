"""Frozen values that travel through JSON unchanged.

The values of this package are standard dataclasses, because they are on the command's way
from its start to its first message, and building pydantic models there costs more than the
whole QMP session. Where JSON comes in or a schema is wanted, pydantic does the work, over the
same classes: `Record` has its four best known methods, and ``pydantic.TypeAdapter`` or a field
of a model take any of them as they are.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any, ClassVar, Literal, Self, TypeVar, dataclass_transform

R = TypeVar("R", bound="Record")
Extra = Literal["ignore", "forbid"]


@dataclass_transform(frozen_default=True)
def record(cls: type[R]) -> type[R]:
    """A frozen dataclass; what `Record` does for all of them is not generated for each."""
    return dataclass(frozen=True, repr=False, eq=False)(cls)


class Record:
    """Base of the package's frozen dataclasses: `record` makes one."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    def __repr__(self) -> str:
        members = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self))  # type: ignore[arg-type]
        return f"{type(self).__name__}({members})"

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash((type(self), *self.__dict__.values()))

    def model_dump(self, *, mode: str = "python") -> dict[str, Any]:
        """The members as a dict; with ``mode="json"`` made of JSON's own types only."""
        return {f.name: _dump(getattr(self, f.name), mode) for f in fields(self)}  # type: ignore[arg-type]

    def model_dump_json(self, *, indent: int | None = None) -> str:
        """The members as one JSON object."""
        return json.dumps(self.model_dump(mode="json"), indent=indent)

    @classmethod
    def model_validate(cls, value: object, *, extra: Extra | None = None) -> Self:
        """Build one from a dict, checked by pydantic (raises `pydantic.ValidationError`).

        Members that it does not have are refused; `extra` "ignore" passes them over.
        """
        return _adapter(cls).validate_python(value, extra=extra)  # type: ignore[no-any-return]

    @classmethod
    def model_validate_json(cls, text: str | bytes) -> Self:
        """Build one from JSON text, checked by pydantic (raises `pydantic.ValidationError`)."""
        return _adapter(cls).validate_json(text)  # type: ignore[no-any-return]


def _dump(value: Any, mode: str) -> Any:
    if isinstance(value, Record):
        return value.model_dump(mode=mode)
    if isinstance(value, (list, tuple)):
        items = [_dump(item, mode) for item in value]
        return items if mode == "json" else type(value)(items)
    if isinstance(value, dict):
        return {key: _dump(item, mode) for key, item in value.items()}
    if mode == "json" and isinstance(value, datetime):
        return value.isoformat()
    return value


_adapters: dict[type, Any] = {}


def _adapter(cls: type) -> Any:
    if cls not in _adapters:
        from pydantic import TypeAdapter

        _adapters[cls] = TypeAdapter(cls)
    return _adapters[cls]
