"""What is wrong with a configuration, in the words of whoever wrote it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

_PLAIN = {
    "missing": "is missing",
    "int_type": "must be a whole number, without quotes",
    "int_parsing": "must be a whole number, without quotes",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be a text: put it in quotes",
    "tuple_type": "must be a list, in [ ]",
    "list_type": "must be a list, in [ ]",
    "dict_type": "must be a table",
    "model_type": "must be a table",
    "model_attributes_type": "must be a table",
    "finite_number": "must be a finite number",
    "string_too_short": "must not be empty",
    "too_short": "must not be empty",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "string_too_long": "may have at most {max_length} characters",
    "too_long": "may have at most {max_length} entries",
    "literal_error": "must be {expected}",
}

_SHAPES = {
    "mode": 'must be a file mode in quotes, as in "0660"',
    "tcp": 'must be an address of this host itself, as in "127.0.0.1:8080" or "[::1]:8080"',
    "at": 'must be a time of day, as in "03:00"',
}


def in_words(error: ValidationError, model: type[BaseModel]) -> str:
    """All that is wrong, each with its place."""
    return "; ".join(_told(each, model) for each in error.errors())


def _told(each: Mapping[str, Any], model: type[BaseModel]) -> str:
    place, kind = each["loc"], each["type"]
    named = ".".join(map(str, place)) or "top"
    if kind == "extra_forbidden":
        known = ", ".join(_members(model, place[:-1]))
        return f"{named}: is not known here" + (f"; there are {known}" if known else "")
    if kind == "string_pattern_mismatch" and place[-1] in _SHAPES:
        return f"{named}: {_SHAPES[place[-1]]}"
    if kind in _PLAIN:
        return f"{named}: {_PLAIN[kind].format(**each.get('ctx', {}))}"
    return f"{named}: {each['msg'].removeprefix('Value error, ')}"


def _members(model: type[BaseModel], place: Sequence[int | str]) -> list[str]:
    """What the table at this place may have."""
    found = [model]
    for part in place:
        if isinstance(part, str):
            found = [
                inner
                for each in found
                if part in each.model_fields
                for inner in _models(each.model_fields[part].annotation)
            ]
    return sorted({name for each in found for name in each.model_fields})


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, UnionType, Annotated, tuple, list, dict):
        for each in get_args(annotation):
            yield from _models(each)
